//! Which failures of SQLite are the disk's, by its result codes (<https://sqlite.org/rescode.html>).

use std::error::Error;
use std::sync::Arc;

use crate::store::Disk;

/// `SQLITE_READONLY`, the primary code of several.
const READONLY: i32 = 8;
/// `SQLITE_IOERR_WRITE` and its like: what a file system says that became read-only below an open file, as ext4 does after an error of its disk.
const WRITE: i32 = 778;
const FSYNC: i32 = 1034;
const DIR_FSYNC: i32 = 1290;
const TRUNCATE: i32 = 1546;
const SHMOPEN: i32 = 4618;
/// `SQLITE_FULL`.
const FULL: i32 = 13;
/// `SQLITE_IOERR_SHMSIZE`: the index of the write-ahead log could not grow.
const SHMSIZE: i32 = 4874;

/// What the disk has to do with a failure.
pub(super) fn trouble(error: &(dyn Error + 'static)) -> Option<Disk> {
    let shared = || error.downcast_ref::<Arc<sqlx::Error>>().map(AsRef::as_ref);
    let error = error.downcast_ref::<sqlx::Error>().or_else(shared)?;
    match error.as_database_error()?.code()?.parse::<i32>().ok()? {
        FULL | SHMSIZE => Some(Disk::Full),
        WRITE | FSYNC | DIR_FSYNC | TRUNCATE | SHMOPEN => Some(Disk::ReadOnly),
        code if code & 0xff == READONLY => Some(Disk::ReadOnly),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use sqlx::sqlite::SqliteConnectOptions;
    use sqlx::{ConnectOptions, SqliteConnection};

    use super::*;
    use crate::store::StoreError;
    use crate::store::sqlite::failed;

    async fn refused(db: &mut SqliteConnection, statement: &'static str) -> Option<Disk> {
        let error = sqlx::query(statement).execute(db).await.unwrap_err();
        let (alone, shared) = (trouble(&error), Arc::new(error));
        assert_eq!(trouble(&shared), alone);
        match failed("write")(shared) {
            StoreError::Database { disk, .. } => assert_eq!(disk, alone),
            other => panic!("{other}"),
        }
        alone
    }

    #[tokio::test]
    async fn a_full_disk_and_a_read_only_one_are_known_from_other_failures() {
        let dir = tempfile::tempdir().unwrap();
        let options =
            SqliteConnectOptions::new().filename(dir.path().join("db")).create_if_missing(true);
        let mut db = options.connect().await.unwrap();
        sqlx::query("CREATE TABLE t (x)").execute(&mut db).await.unwrap();
        // As many pages as there are: the next is one too many, as on a disk that is full.
        sqlx::query("PRAGMA max_page_count = 1").execute(&mut db).await.unwrap();
        let large = "INSERT INTO t VALUES (zeroblob(100000))";
        assert_eq!(refused(&mut db, large).await, Some(Disk::Full));
        sqlx::query("PRAGMA query_only = 1").execute(&mut db).await.unwrap();
        assert_eq!(refused(&mut db, large).await, Some(Disk::ReadOnly));
        assert_eq!(refused(&mut db, "INSERT INTO nowhere VALUES (1)").await, None);
    }
}
