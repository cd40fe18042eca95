//! Panics of tasks, which nobody would hear of otherwise.

use std::cell::RefCell;
use std::sync::Once;

thread_local! {
    static HEARD: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// While it lives, the panics of this thread are kept instead of printed.
pub(super) struct Panics(());

impl Panics {
    pub(super) fn listen() -> Self {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                let kept =
                    HEARD.with_borrow_mut(|heard| heard.as_mut().map(|heard| heard.push(panic.to_string())));
                if kept.is_none() {
                    usual(panic);
                }
            }));
        });
        HEARD.set(Some(Vec::new()));
        Self(())
    }

    pub(super) fn heard(&self) -> Vec<String> {
        let Self(()) = self;
        HEARD.with_borrow(|heard| heard.clone().unwrap_or_default())
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        HEARD.set(None);
    }
}
