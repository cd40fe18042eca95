//! The stores of a consumer's queues.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::config::{QueueConfig, StoreChoice};
use crate::Error;
use crate::dedup::{DedupStore, MemoryStore, connect};

/// What the queues' choices come to: one connection for each URL, made when it is first asked for.
pub(super) struct Stores {
    /// For queues that choose none.
    pub(super) default: StoreChoice,
    in_memory: Option<Arc<dyn DedupStore>>,
    by_url: HashMap<String, Arc<dyn DedupStore>>,
}

impl Default for Stores {
    fn default() -> Self {
        Self { default: StoreChoice::Default, in_memory: None, by_url: HashMap::new() }
    }
}

impl Stores {
    /// The store of this queue; connects to it if no queue before has.
    pub(super) async fn of(&mut self, queue: &QueueConfig) -> Result<Arc<dyn DedupStore>, Error> {
        let choice = match &queue.store {
            StoreChoice::Default => self.default.clone(),
            own => own.clone(),
        };
        match choice {
            StoreChoice::Default => Ok(self.in_memory()),
            StoreChoice::Given(store) => Ok(store),
            StoreChoice::At(url) => self.at(url, &queue.spec.name).await,
        }
    }

    fn in_memory(&mut self) -> Arc<dyn DedupStore> {
        Arc::clone(self.in_memory.get_or_insert_with(|| Arc::new(MemoryStore::new())))
    }

    async fn at(&mut self, url: String, queue: &str) -> Result<Arc<dyn DedupStore>, Error> {
        if let Some(store) = self.by_url.get(&url) {
            return Ok(Arc::clone(store));
        }
        let store = connect(&url).await.map_err(|error| Error::store_of(queue, error))?;
        self.by_url.insert(url, Arc::clone(&store));
        Ok(store)
    }
}

/// The store of this queue, for one who is not its consumer. `None`: it is in the memory of the consumer's process.
pub(crate) async fn from_elsewhere(queue: &QueueConfig) -> Result<Option<Arc<dyn DedupStore>>, Error> {
    if let Some(inbox) = &queue.inbox {
        return Ok(Some(inbox.store()));
    }
    match &queue.store {
        StoreChoice::Default => Ok(None),
        StoreChoice::Given(store) => Ok(Some(Arc::clone(store))),
        // A new one would know nothing.
        StoreChoice::At(url) if url.starts_with("memory:") => Ok(None),
        StoreChoice::At(url) => {
            connect(url).await.map(Some).map_err(|error| Error::store_of(&queue.spec.name, error))
        }
    }
}

/// No URLs: they may hold passwords.
impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stores").field("connected", &self.by_url.len()).finish_non_exhaustive()
    }
}
