//! What a test's own thread logs.

use std::cell::RefCell;
use std::io::{Result, Write};
use std::sync::Once;

use tracing_subscriber::filter::dynamic_filter_fn;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, registry};

thread_local! {
    static LOG: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// Captures everything that is logged by this thread, at every level, until it is dropped.
///
/// One subscriber serves all tests of the process: with one per test, a callsite that two threads meet
/// for the first time at once may stay off for both.
pub(crate) struct LogCapture(());

impl LogCapture {
    pub(crate) fn begin() -> Self {
        static SUBSCRIBER: Once = Once::new();
        SUBSCRIBER.call_once(|| {
            let wanted = dynamic_filter_fn(|_, _| LOG.with_borrow(Option::is_some));
            let writer = || ThreadLog;
            let layer = tracing_subscriber::fmt::layer()
                .with_ansi(false)
                .with_span_events(FmtSpan::FULL)
                .with_writer(writer)
                .with_filter(wanted);
            tracing::subscriber::set_global_default(registry().with(layer)).unwrap();
        });
        LOG.set(Some(Vec::new()));
        Self(())
    }

    pub(crate) fn text(&self) -> String {
        let Self(()) = self;
        LOG.with_borrow(|log| String::from_utf8_lossy(log.as_deref().unwrap_or_default()).into_owned())
    }
}

impl Drop for LogCapture {
    fn drop(&mut self) {
        LOG.set(None);
    }
}

struct ThreadLog;

impl Write for ThreadLog {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        LOG.with_borrow_mut(|log| log.as_mut().map(|log| log.extend_from_slice(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
