//! SIGTERM and SIGINT stop the server, the second one at once; at SIGHUP one with TLS reads its certificate again.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What an operator asks for with SIGTERM and SIGINT.
#[derive(Clone, Default)]
pub(super) struct Asked {
    /// Cancelled at the first of them: to stop.
    pub stop: CancellationToken,
    /// Cancelled at the second: to wait for nobody.
    pub hurry: CancellationToken,
}

/// Listens from now on.
pub(super) fn asked() -> std::io::Result<Asked> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let asked = Asked::default();
    let Asked { stop, hurry } = asked.clone();
    tokio::spawn(async move {
        for token in [stop, hurry] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            token.cancel();
        }
    });
    Ok(asked)
}

/// Does something at each SIGHUP, in a thread that may wait for files.
pub(super) fn on_hang_up(
    act: impl Fn() + Clone + Send + 'static,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let mut hang_up = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while let Some(Some(())) = stop.run_until_cancelled(hang_up.recv()).await {
            // One after the other: the last one reads what is there last.
            if tokio::task::spawn_blocking(act.clone()).await.is_err() {
                tracing::error!("what SIGHUP asks for broke down");
            }
        }
    });
    Ok(())
}
