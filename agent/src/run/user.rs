//! Who a program runs as: an image's `user` text, looked up in its own `/etc/passwd` and `/etc/group`.
//! Pure and bounded.
//!
//! The rules are those of other container tools (moby `user.GetExecUser`): the first line that matches by name
//! or number counts; a number need not be in the files; further groups are those that list the user, and only
//! where the text names no group.

/// Most bytes of each of the two files. Distributions' have some KiB.
pub const MAX_FILE: usize = 1024 * 1024;
/// Most further groups. Linux takes 65536; nobody has more than some.
const MAX_GROUPS: usize = 1024;
/// The largest number of a user or group, as other container tools have it.
const MAX_ID: u32 = i32::MAX as u32;

/// Who a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's number.
    pub uid: u32,
    /// Its group's.
    pub gid: u32,
    /// Of the groups that it is in besides.
    pub groups: Vec<u32>,
    /// Its home directory.
    pub home: String,
}

/// A user that the image does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// No such name.
    #[error("the image's /etc/passwd has no user {0:?}")]
    NoUser(String),
    /// No such name.
    #[error("the image's /etc/group has no group {0:?}")]
    NoGroup(String),
    /// Over the bound.
    #[error("{0:?} is no number of a user or group; they end at {MAX_ID}")]
    Number(String),
}

/// Finds the user of the text.
pub fn find(text: &str, passwd: &[u8], group: &[u8]) -> Result<User, UserError> {
    let (wanted, wanted_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    // Without a user the image's root counts.
    let wanted = if wanted.is_empty() { "0" } else { wanted };
    let number = number(wanted)?;
    let entry = accounts(passwd).find(|entry| entry.name == wanted || Some(entry.uid) == number);
    let (uid, gid, home, name) = match (entry, number) {
        (Some(entry), _) => (entry.uid, entry.gid, entry.home, Some(entry.name)),
        (None, Some(number)) => (number, 0, String::new(), None),
        (None, None) => return Err(UserError::NoUser(wanted.to_owned())),
    };
    let (gid, further) = match wanted_group {
        Some(wanted) => (find_group(wanted, group)?, vec![]),
        None => (gid, name.map(|name| groups_of(&name, group)).unwrap_or_default()),
    };
    let home = if home.is_empty() { "/".to_owned() } else { home };
    Ok(User { uid, gid, groups: further, home })
}

fn find_group(wanted: &str, group: &[u8]) -> Result<u32, UserError> {
    let number = number(wanted)?;
    let found = groups(group).find(|entry| entry.name == wanted || Some(entry.gid) == number);
    found.map(|entry| entry.gid).or(number).ok_or_else(|| UserError::NoGroup(wanted.to_owned()))
}

fn groups_of(user: &str, group: &[u8]) -> Vec<u32> {
    let mut found = vec![];
    for entry in groups(group).filter(|entry| entry.members.split(',').any(|member| member == user))
    {
        if !found.contains(&entry.gid) && found.len() < MAX_GROUPS {
            found.push(entry.gid);
        }
    }
    found
}

/// The number that the text writes; an error for one that no user can have.
fn number(text: &str) -> Result<Option<u32>, UserError> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    let number = text.parse().ok().filter(|number| *number <= MAX_ID);
    number.map(Some).ok_or_else(|| UserError::Number(text.to_owned()))
}

/// A line of `/etc/passwd` (passwd(5)).
struct Account {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

/// A line of `/etc/group` (group(5)).
struct Group {
    name: String,
    gid: u32,
    members: String,
}

fn accounts(passwd: &[u8]) -> impl Iterator<Item = Account> {
    lines(passwd).filter_map(|fields| match fields.as_slice() {
        [name, _, uid, gid, _, home, ..] => {
            Some(Account { name: name.clone(), uid: id(uid)?, gid: id(gid)?, home: home.clone() })
        }
        _ => None,
    })
}

fn groups(group: &[u8]) -> impl Iterator<Item = Group> {
    lines(group).filter_map(|fields| match fields.as_slice() {
        [name, _, gid, members, ..] => {
            Some(Group { name: name.clone(), gid: id(gid)?, members: members.clone() })
        }
        _ => None,
    })
}

fn id(text: &str) -> Option<u32> {
    number(text).ok().flatten()
}

/// The fields of every line that is text and has a name.
fn lines(file: &[u8]) -> impl Iterator<Item = Vec<String>> {
    let file = &file[..file.len().min(MAX_FILE)];
    file.split(|&b| b == b'\n').filter_map(|line| {
        let fields: Vec<String> =
            std::str::from_utf8(line).ok()?.trim().split(':').map(str::to_owned).collect();
        (!fields[0].is_empty() && !fields[0].starts_with('#')).then_some(fields)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # a comment:x:1:1::/:/\n\
        app:x:1000:1001::/srv/app:/bin/sh\n\
        broken:x:one:1::/:\n\
        short:x:5\n\
        1234:x:77:78::/home/digits:\n\
        homeless:x:8:9:::\n\
        app:x:1:1::/second:\n\
        \xff\xfe:x:3:3::/:\n";
    const GROUP: &[u8] =
        b"root:x:0:\nstaff:x:50:app,homeless\naudio:x:29:app\nmore:x:50:app\nadm:x:4:application\nbad:x:x:app\n";

    #[expect(clippy::unnecessary_wraps, reason = "compared with results")]
    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> Result<User, UserError> {
        Ok(User { uid, gid, groups: groups.to_vec(), home: home.into() })
    }

    #[test]
    fn every_form_is_understood() {
        let find = |text| find(text, PASSWD, GROUP);
        let app = user(1000, 1001, &[50, 29], "/srv/app");
        assert_eq!(find("app"), app);
        assert_eq!(find("1000"), app, "a number that has a name is that user");
        assert_eq!(find("app:"), app);
        assert_eq!(find(""), user(0, 0, &[], "/root"));
        assert_eq!(find("app:audio"), user(1000, 29, &[], "/srv/app"));
        assert_eq!(find("app:4242"), user(1000, 4242, &[], "/srv/app"));
        assert_eq!(find("4242"), user(4242, 0, &[], "/"));
        assert_eq!(find("4242:50"), user(4242, 50, &[], "/"));
        assert_eq!(find(":staff"), user(0, 50, &[], "/root"));
        assert_eq!(find("1234"), user(77, 78, &[], "/home/digits"), "names may be digits");
        assert_eq!(find("homeless"), user(8, 9, &[50], "/"));
    }

    #[test]
    fn an_image_without_files_has_numbers_only() {
        assert_eq!(find("", b"", b""), user(0, 0, &[], "/"));
        assert_eq!(find("7:8", b"", b""), user(7, 8, &[], "/"));
        assert_eq!(find("app", b"", b""), Err(UserError::NoUser("app".into())));
        assert_eq!(find("7:staff", b"", b""), Err(UserError::NoGroup("staff".into())));
    }

    #[test]
    fn lines_that_are_broken_are_nobody() {
        for name in ["broken", "short", "# a comment"] {
            assert_eq!(find(name, PASSWD, GROUP), Err(UserError::NoUser(name.into())));
        }
        assert!(matches!(find("root:bad", PASSWD, GROUP), Err(UserError::NoGroup(_))));
    }

    #[test]
    fn bounds_hold_at_and_break_above() {
        assert_eq!(find("2147483647", b"", b""), user(MAX_ID, 0, &[], "/"));
        for above in ["2147483648", "4294967296", "99999999999999999999"] {
            assert_eq!(find(above, b"", b""), Err(UserError::Number(above.into())));
        }
        let many: String = (1..=MAX_GROUPS + 1).map(|n| format!("g{n}:x:{n}:a\n")).collect();
        let found = find("a", b"a:x:1:1::/:\n", many.as_bytes()).unwrap();
        assert_eq!(found.groups.len(), MAX_GROUPS);
        let mut long = vec![b'\n'; MAX_FILE];
        long.extend(b"late:x:1:1::/:\n");
        assert!(find("late", &long, b"").is_err());
        assert!(find("late", &long[15..], b"").is_ok());
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "[a-z0-9:]{0,20}", passwd: Vec<u8>, group: Vec<u8>) {
            let _ = find(&text, &passwd, &group);
        }

        #[test]
        fn a_user_that_is_there_is_found(name in "[a-z][a-z0-9]{0,8}", uid in 0..MAX_ID, gid in 0..MAX_ID) {
            let passwd = format!("{name}:x:{uid}:{gid}::/h:/bin/sh\n");
            prop_assert_eq!(find(&name, passwd.as_bytes(), b""), user(uid, gid, &[], "/h"));
        }
    }
}
