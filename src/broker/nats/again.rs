//! The stream of our own beside a durable, for copies that come back to this durable and to nobody else: its names, and
//! how it is made or checked.

use std::time::Duration;

use async_nats::client::Request;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::stream::{self, RetentionPolicy, StorageType};

use super::connect::{Link, Nats};
use super::holds::{Clock, Holds};
use super::topology::{self, Durable, Names, refused};
use crate::broker::{BrokerError, BrokerErrorKind, Destination, QueueSpec};

/// How many copies may wait in a durable's own stream without message schedules: a million. More wait undelivered, and
/// come late.
const MAX_ACK_PENDING: i64 = 1_000_000;

/// The subject of copies that are due is this, and then `stream.durable`: no name has a dot, so no two durables share one.
const DUE: &str = "guestlist.again.";
/// Copies on schedule are kept under this, and then `stream.durable.delivery`.
const HELD: &str = "guestlist.hold.";
/// Core NATS has no durables: nobody keeps this.
const CORE: &str = "guestlist.core.";
/// Nor this: the queue is told to go without. A stream of ours may be there all the same, which nobody pulls.
const WITHOUT: &str = "guestlist.without.";

/// The server takes no longer one than 255 bytes.
const LONGEST_NAME: usize = 200;

/// What the durable's own stream, its subject and its durable are called.
pub(super) fn names(source: &Names) -> Names {
    let Names { stream, durable, .. } = source;
    let (stream, subject) = (stream_name(stream, durable), format!("{DUE}{stream}.{durable}"));
    Names { stream, subject, durable: durable.clone() }
}

/// Both names may hold any dashes: the length of the first, at the end, says where it ends.
fn stream_name(stream: &str, durable: &str) -> String {
    let name = format!("guestlist-{stream}-{durable}-{}", stream.len());
    if name.len() <= LONGEST_NAME {
        return name;
    }
    format!("guestlist-{}", blake3::hash(name.as_bytes()).to_hex())
}

/// Where copies go that are on schedule for `due`, one subject for each: a second one replaces the first.
pub(super) fn held(due: &Names, delivery: &str) -> String {
    format!("{HELD}{}.{delivery}", due.subject.trim_start_matches(DUE))
}

/// Where a copy goes that is to be worked on again.
pub(super) fn destination(queue: &QueueSpec) -> Destination {
    match Names::of(queue) {
        Ok(source) if queue.nats.core => Destination::new(format!("{CORE}{}", source.durable)),
        Ok(source) if queue.nats.without_own_stream => {
            Destination::new(format!("{WITHOUT}{}", source.durable))
        }
        Ok(source) => Destination::new(names(&source).subject),
        // `prepare` refuses such a queue. Its name may be a subject that others read.
        Err(_) => Destination::new(format!("{DUE}{}", topology::legal(&queue.name))),
    }
}

/// The stream that must keep what is published to this subject, if it is one of ours: another one, of `>`, say, would
/// confirm a copy that nobody pulls.
///
/// # Errors
///
/// `Refused`: there can be none.
pub(super) fn keeper(subject: &str) -> Result<Option<String>, BrokerError> {
    if let Some(durable) = subject.strip_prefix(CORE) {
        return Err(refused(format!(
            "core NATS keeps nothing, so nothing can be sent back to the queue group `{durable}`: consume from a stream"
        )));
    }
    if let Some(durable) = subject.strip_prefix(WITHOUT) {
        return Err(refused(format!(
            "the durable `{durable}` goes without a stream of its own (`without_own_stream`), so nothing can be sent back \
             to it alone: let it have one, or name another destination"
        )));
    }
    let Some(place) = subject.strip_prefix(DUE) else { return Ok(None) };
    let names = place.split_once('.');
    let names = names.ok_or_else(|| refused(format!("`{subject}` names no stream and durable")))?;
    Ok(Some(stream_name(names.0, names.1)))
}

/// A stream of our own that is there and as it should be.
pub(super) struct Own {
    pub(super) durable: Durable,
    pub(super) holds: Holds,
}

/// Why there is none.
enum NotMade {
    /// This user may not publish to this subject.
    Forbidden(String),
    /// The server will not have it.
    Refused(BrokerError),
    /// It is there and will not do, or nobody answers.
    Broken(BrokerError),
}

impl From<BrokerError> for NotMade {
    fn from(error: BrokerError) -> Self {
        if error.kind() == BrokerErrorKind::Refused { Self::Refused(error) } else { Self::Broken(error) }
    }
}

/// Makes or checks the stream of our own, whatever `declare` says; `None`: it goes without.
///
/// # Errors
///
/// There is one that will not do: copies in it would be lost, or seen by others. Or nobody answers.
pub(super) async fn prepare(
    nats: &Nats,
    link: &Link,
    spec: &QueueSpec,
    source: &Durable,
) -> Result<Option<Own>, BrokerError> {
    let names = names(&source.names);
    if spec.nats.without_own_stream || nats.forbidden().contains(&names.stream) {
        return Ok(None);
    }
    match make(nats, link, spec, &names, source.replicas).await {
        Ok(own) => Ok(Some(own)),
        Err(NotMade::Broken(error)) => Err(error),
        Err(NotMade::Refused(error)) => {
            warn_without(spec, &names, &error);
            Ok(None)
        }
        Err(NotMade::Forbidden(subject)) => {
            warn_without(spec, &names, &refused(format!("this user may not publish to `{subject}`")));
            nats.forbidden().extend([names.stream, subject]);
            Ok(None)
        }
    }
}

/// Says what waits in a stream of ours that this queue goes without, from an earlier start, say; where it can be asked.
pub(super) async fn warn_of_rest(nats: &Nats, link: &Link, spec: &QueueSpec, source: &Durable) {
    let names = names(&source.names);
    // The server logs each question that it forbids.
    if nats.forbidden().contains(&format!("$JS.API.STREAM.INFO.{}", names.stream)) {
        return;
    }
    match permitted(link, &names, topology::stream_info(link, &names.stream)).await {
        Ok(Some(found)) if found.state.messages > 0 => tracing::warn!(
            target: "guestlist", queue = spec.name, stream = names.stream, messages = found.state.messages,
            "this queue goes without a stream of its own, in which messages wait: nobody pulls them until it may have it again"
        ),
        Err(NotMade::Forbidden(subject)) => {
            nats.forbidden().insert(subject);
        }
        _ => {}
    }
}

fn warn_without(spec: &QueueSpec, names: &Names, error: &BrokerError) {
    tracing::warn!(
        target: "guestlist", queue = spec.name, stream = names.stream, ?error,
        "this queue goes without a stream of its own: long delays occupy its durable's max_ack_pending, and dead letters \
         cannot be sent back to it. Give it the permission (see the docs of `broker::nats`) and restart, or say \
         `without_own_stream`"
    );
}

async fn make(
    nats: &Nats,
    link: &Link,
    spec: &QueueSpec,
    names: &Names,
    replicas: usize,
) -> Result<Own, NotMade> {
    let stream = find_or_make_stream(link, names, replicas).await?;
    check_stream(&stream, names).map_err(NotMade::Broken)?;
    let info = find_or_make_durable(link, &stream, names, spec).await?;
    permitted(link, names, can_be_pulled(link, names)).await?;
    let schedules = stream.allow_message_schedules;
    let clock = Clock::of(link, &names.stream, schedules).await?;
    let holds = Holds::new(link, nats.confirm(), names, schedules, clock);
    Ok(Own { durable: Durable::new(names.clone(), &stream, &info.config), holds })
}

/// A request that is not permitted is never answered; the server says so elsewhere.
async fn permitted<T>(
    link: &Link,
    names: &Names,
    step: impl Future<Output = Result<T, BrokerError>>,
) -> Result<T, NotMade> {
    tokio::select! {
        biased;
        subject = link.denial(&names.stream) => Err(NotMade::Forbidden(subject)),
        done = step => Ok(done?),
    }
}

async fn find_or_make_stream(link: &Link, names: &Names, replicas: usize) -> Result<stream::Config, NotMade> {
    let wanted = config(link, names, replicas);
    match permitted(link, names, topology::stream_config(link, &names.stream)).await? {
        Some(found) => Ok(brought_up(link, names, found, &wanted).await),
        None => permitted(link, names, topology::make_stream(link, wanted)).await,
    }
}

fn config(link: &Link, names: &Names, replicas: usize) -> stream::Config {
    stream::Config {
        name: names.stream.clone(),
        subjects: vec![names.subject.clone(), held(names, "*")],
        retention: RetentionPolicy::WorkQueue,
        storage: StorageType::File,
        num_replicas: replicas,
        description: Some("guestlist: what comes back to one durable".to_owned()),
        // An older server would ignore it, or refuse what it does not know.
        allow_message_schedules: link.client.is_server_compatible(2, 12, 0),
        ..stream::Config::default()
    }
}

/// The source may have got more replicas, the server may have learned schedules. Without either it works.
async fn brought_up(
    link: &Link,
    names: &Names,
    found: stream::Config,
    wanted: &stream::Config,
) -> stream::Config {
    let better = stream::Config {
        num_replicas: found.num_replicas.max(wanted.num_replicas),
        allow_message_schedules: found.allow_message_schedules || wanted.allow_message_schedules,
        ..found.clone()
    };
    if better == found {
        return found;
    }
    let update = async {
        let updated = link.jetstream.update_stream(&better).await;
        updated.map_err(|error| refused("the stream cannot be changed").with_source(error))
    };
    if let Ok(updated) = permitted(link, names, update).await {
        return updated.config;
    }
    tracing::warn!(
        target: "guestlist", stream = names.stream, replicas = better.num_replicas,
        schedules = better.allow_message_schedules,
        "a stream of ours cannot be changed to what the source and the server would allow; it is used as it is"
    );
    found
}

/// Refuses a stream in which copies would be lost, or out of reach, naming every reason.
fn check_stream(config: &stream::Config, names: &Names) -> Result<(), BrokerError> {
    let subjects = [names.subject.clone(), held(names, "*")];
    let wrong: Vec<&str> = [
        (config.retention != RetentionPolicy::WorkQueue, "its retention is not `workqueue`"),
        (
            !subjects.iter().all(|subject| config.subjects.contains(subject)),
            "it does not keep its two subjects",
        ),
        (!config.max_age.is_zero(), "it has a max_age, by which delayed messages would be lost"),
        (config.max_messages > 0 || config.max_bytes > 0, "it has a limit, by which messages would be lost"),
        (
            config.max_messages_per_subject > 0,
            "it has a limit for each subject, by which messages would be lost",
        ),
        (config.storage != StorageType::File, "it is kept in memory"),
        (config.no_ack, "it confirms nothing (no_ack)"),
        (config.sealed, "it is sealed"),
        (config.mirror.is_some() || config.sources.is_some(), "it mirrors another stream"),
    ]
    .into_iter()
    .filter_map(|(wrong, why)| wrong.then_some(why))
    .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    Err(refused(format!(
        "the stream `{}`, for what comes back to the durable `{}`, will not do: {}. Change it (nats stream edit), or \
         delete it when it is empty, and it is made again with the subjects {subjects:?}",
        names.stream,
        names.durable,
        wrong.join("; ")
    )))
}

/// It is ours: what does not fit is made to.
async fn find_or_make_durable(
    link: &Link,
    stream: &stream::Config,
    names: &Names,
    spec: &QueueSpec,
) -> Result<Info, NotMade> {
    let check = |info: &Info| topology::check_durable(&info.config, stream, names, spec);
    let found = permitted(link, names, topology::durable_info(link, names)).await?;
    if let Some(info) = found.filter(|info| check(info).is_ok()) {
        return Ok(info);
    }
    let made = topology::make_durable(link, names, spec, MAX_ACK_PENDING);
    let info = permitted(link, names, made).await?;
    check(&info).map_err(NotMade::Broken)?;
    Ok(info)
}

/// Asks what no server grants, a heartbeat as long as the request: answered, and nothing is delivered. Without the
/// permission to pull, copies would lie there and the subscription would look silent.
async fn can_be_pulled(link: &Link, names: &Names) -> Result<(), BrokerError> {
    let Names { stream, durable, .. } = names;
    let millisecond = Duration::from_millis(1).as_nanos();
    let payload = format!(r#"{{"batch":1,"expires":{millisecond},"idle_heartbeat":{millisecond}}}"#);
    let api = format!("CONSUMER.MSG.NEXT.{stream}.{durable}");
    let asked = link.client.send_request(format!("$JS.API.{api}"), Request::new().payload(payload.into()));
    let act = || format!("pull from the durable `{durable}` of the stream `{stream}`");
    asked.await.map(drop).map_err(|error| topology::no_answer(&act(), &api, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(stream: &str, durable: &str) -> Names {
        names(&Names { stream: stream.into(), subject: "s".into(), durable: durable.into() })
    }

    #[test]
    fn no_two_durables_share_a_stream_or_a_subject() {
        let parts = ["a", "b", "-", "a-", "-a", "a-b", "b-a", "a-b-1", "1", "3", "-3", "a_b", "A"];
        let pairs = || parts.iter().flat_map(|stream| parts.iter().map(move |durable| (*stream, *durable)));
        let mut streams: Vec<String> = pairs().map(|(stream, durable)| of(stream, durable).stream).collect();
        let mut subjects: Vec<String> =
            pairs().map(|(stream, durable)| of(stream, durable).subject).collect();
        for names in [&mut streams, &mut subjects] {
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), parts.len() * parts.len());
        }
        let long = "x".repeat(250);
        assert_ne!(of(&long, "d").stream, of(&long, "e").stream);
        assert!(of(&long, &long).stream.len() <= LONGEST_NAME);
        assert_eq!(of("shop", "mail").stream, "guestlist-shop-mail-4");
    }

    #[test]
    fn a_subject_of_ours_says_which_stream_must_keep_it() {
        for (stream, durable) in [("shop", "mail"), ("a-b", "c"), ("a", "b-c")] {
            let names = of(stream, durable);
            assert_eq!(keeper(&names.subject).unwrap(), Some(names.stream.clone()));
            assert_eq!(held(&names, "s1-2"), format!("guestlist.hold.{stream}.{durable}.s1-2"));
        }
        assert_eq!(keeper("charges.dead").unwrap(), None);
        assert!(keeper("guestlist.again.half").is_err());
    }

    #[test]
    fn what_cannot_come_back_to_one_durable_goes_to_no_subject_that_others_read() {
        let mut spec = QueueSpec::new("charges");
        assert_eq!(destination(&spec).name(), "guestlist.again.charges.charges");
        spec.nats.without_own_stream = true;
        assert!(keeper(destination(&spec).name()).unwrap_err().to_string().contains("`without_own_stream`"));
        spec.nats.core = true;
        assert!(keeper(destination(&spec).name()).unwrap_err().to_string().contains("core NATS"));
        spec.nats.core = false;
        spec.nats.stream = Some("a.b".into());
        assert!(keeper(destination(&spec).name()).is_err());
    }

    #[test]
    fn a_stream_that_would_lose_copies_is_refused() {
        let names = of("s", "d");
        let good = stream::Config {
            subjects: vec![names.subject.clone(), held(&names, "*")],
            retention: RetentionPolicy::WorkQueue,
            max_messages: -1,
            max_bytes: -1,
            ..stream::Config::default()
        };
        check_stream(&good, &names).unwrap();
        for bad in [
            stream::Config { retention: RetentionPolicy::Limits, ..good.clone() },
            stream::Config { retention: RetentionPolicy::Interest, ..good.clone() },
            stream::Config { subjects: vec![names.subject.clone()], ..good.clone() },
            stream::Config { max_age: Duration::from_secs(1), ..good.clone() },
            stream::Config { max_messages: 1, ..good.clone() },
            stream::Config { max_bytes: 1, ..good.clone() },
            stream::Config { max_messages_per_subject: 1, ..good.clone() },
            stream::Config { storage: StorageType::Memory, ..good.clone() },
            stream::Config { no_ack: true, ..good.clone() },
            stream::Config { sealed: true, ..good.clone() },
        ] {
            assert!(check_stream(&bad, &names).unwrap_err().to_string().contains(&names.stream));
        }
    }
}
