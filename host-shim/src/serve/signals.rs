//! SIGTERM and SIGINT stop the server; at SIGHUP one with TLS reads its certificate again.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Cancelled at the first of them.
pub(super) fn stop() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        token.cancel();
    });
    Ok(stop)
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
