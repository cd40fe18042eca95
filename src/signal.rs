//! When to stop.

/// Ends at Ctrl-C, and on Unix at SIGTERM. A second signal during the drain is the operating system's again: it ends
/// the process at once.
///
/// # Panics
///
/// Outside a tokio runtime with its I/O enabled.
///
/// # Cancel safety
///
/// Cancel safe.
pub async fn signal() {
    #[cfg(unix)]
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            // No handler could be installed: the default action ends the process.
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminated = std::future::pending::<()>();
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminated => {}
    }
}
