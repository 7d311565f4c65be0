//! A failed step that stays: its monitor makes its container again for whoever wants to enter it, see [`super::hold`].

use std::collections::HashMap;

use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::server::{Settings, StepRecord, read_message};
use super::wire::{FromWrapper, HOLD, HOLD_WITH_SECRETS};
use crate::exec::{Target, Wanted};

/// Has a failed step stay, and makes its container again for whoever wants to enter it.
pub(super) async fn stay(
    wrapper: &mut BufReader<UnixStream>,
    settings: &Settings,
    record: &StepRecord,
) {
    let (ask, mut asked) = mpsc::channel(1);
    settings.enterable.ask(ask);
    // A build that is about to end has no use for it.
    let _ = settings.held.send(Some(record.clone()));
    let mut made = HashMap::new();
    while let Some(Wanted { secrets, answer }) = asked.recv().await {
        let target = match made.get(&secrets) {
            Some(target) => Ok(Target::clone(target)),
            None => make_again(wrapper, secrets).await,
        };
        if let Ok(target) = &target {
            made.insert(secrets, target.clone());
        }
        // Who asked may be gone.
        let _ = answer.send(target);
    }
}

/// The failed step's container, again. Its monitor has a deadline for it, see `hold::DEADLINE`.
async fn make_again(wrapper: &mut BufReader<UnixStream>, secrets: bool) -> Result<Target, String> {
    let order = if secrets { HOLD_WITH_SECRETS } else { HOLD };
    let answer = async {
        wrapper.write_all(&[order]).await?;
        read_message(wrapper).await
    };
    match answer.await {
        Ok(FromWrapper::Held { id, config, cgroup }) => {
            Ok(Target { id, root: None, config, cgroup, secrets })
        }
        Ok(FromWrapper::NotHeld { why }) => Err(why),
        Ok(_) | Err(_) => Err("the failed step's monitor does not answer".to_owned()),
    }
}
