//! The stream, the durable and the dead-letter stream: made, or checked.

use std::time::Duration;

use async_nats::client;
use async_nats::jetstream::consumer::{self, AckPolicy, Info, PriorityPolicy, pull};
use async_nats::jetstream::context::{
    ConsumerInfoErrorKind, CreateStreamErrorKind, GetStreamByNameErrorKind, GetStreamErrorKind, RequestError,
    RequestErrorKind,
};
use async_nats::jetstream::stream::{self, ConsumerErrorKind, DiscardPolicy, RetentionPolicy};
use async_nats::jetstream::{self, ErrorCode};

use super::connect::Link;
use crate::broker::{BrokerError, BrokerErrorKind, Declare, Destination, Facts, Kept, QueueSpec};

/// How many deliveries of a durable made by us may be unacked, over all its consumers: 100,000.
///
/// Messages that wait for a short delay count as well, so this must be far more than is in hand; once it is reached,
/// new messages wait until a delay is over. Those with a [long delay](crate::defaults::LONG_DELAY) do not count.
pub const MAX_ACK_PENDING: i64 = 100_000;

/// The server's clock is asked for a new deadline each heartbeat; one of them may be lost.
const HEARTBEATS_PER_ACK_WAIT: u32 = 3;
const FEWEST_HEARTBEATS_PER_ACK_WAIT: u32 = 2;

/// What the queue is called at the server.
#[derive(Clone, Debug)]
pub(super) struct Names {
    pub(super) stream: String,
    pub(super) subject: String,
    pub(super) durable: String,
}

impl Names {
    /// # Errors
    ///
    /// `Refused` for a name that the server does not allow.
    pub(super) fn of(spec: &QueueSpec) -> Result<Self, BrokerError> {
        let stream = spec.nats.stream.clone().unwrap_or_else(|| legal(&spec.name));
        let subject = spec.nats.subject.clone().unwrap_or_else(|| spec.name.clone());
        let durable = legal(&spec.name);
        if spec.name.is_empty() || stream != legal(&stream) {
            return Err(refused(format!("`{stream}` cannot be the name of a stream: {RULE}")));
        }
        if !is_subject(&subject) {
            return Err(refused(format!(
                "`{subject}` cannot be a subject: no spaces, no empty parts between dots"
            )));
        }
        Ok(Self { stream, subject, durable })
    }
}

const RULE: &str = "use letters, digits, `-` and `_`; in a queue's name anything else becomes `_`";

/// A name for a stream or durable: no dots, spaces, wildcards or slashes.
///
/// Two queues may come to the same name; then the second is refused, as the stream does not
/// keep its subject or the durable filters by another.
pub(super) fn legal(name: &str) -> String {
    let keep = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    name.chars().map(|c| if keep(c) { c } else { '_' }).collect()
}

fn is_subject(subject: &str) -> bool {
    subject
        .split('.')
        .all(|part| !part.is_empty() && !part.contains(|c: char| c.is_whitespace() || c.is_control()))
}

/// Whether a message can be published to this subject: no wildcards.
pub(super) fn is_concrete(subject: &str) -> bool {
    is_subject(subject) && subject.split('.').all(|part| part != "*" && part != ">")
}

/// Whether some message can have a subject that matches both.
fn overlap(one: &str, other: &str) -> bool {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    loop {
        match (one.next(), other.next()) {
            (None, None) | (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

/// A durable that is there and as it should be.
#[derive(Debug)]
pub(super) struct Durable {
    pub(super) names: Names,
    /// Of its stream.
    pub(super) replicas: usize,
    /// Its stream has the times of another one, maybe of another server's clock.
    pub(super) mirror: bool,
    /// The most messages that one pull request may ask for.
    pub(super) max_batch: Option<usize>,
    /// The longest that one pull request may stay.
    pub(super) max_expires: Option<Duration>,
}

impl Durable {
    pub(super) fn new(names: Names, stream: &stream::Config, config: &consumer::Config) -> Self {
        Self {
            names,
            replicas: stream.num_replicas,
            mirror: stream.mirror.is_some(),
            max_batch: usize::try_from(config.max_batch).ok().filter(|largest| *largest > 0),
            max_expires: Some(config.max_expires).filter(|longest| !longest.is_zero()),
        }
    }
}

/// Makes or checks the stream and the durable.
pub(super) async fn source(link: &Link, spec: &QueueSpec) -> Result<Durable, BrokerError> {
    let names = Names::of(spec)?;
    let stream = find_or_make_stream(link, &names, spec.declare).await?;
    check_stream(&stream, &names)?;
    let info = find_or_make_durable(link, &names, spec).await?;
    check_durable(&info.config, &stream, &names, spec)?;
    Ok(Durable::new(names, &stream, &info.config))
}

async fn find_or_make_stream(
    link: &Link,
    names: &Names,
    declare: Declare,
) -> Result<stream::Config, BrokerError> {
    let found = stream_config(link, &names.stream).await?;
    match (found, declare) {
        (Some(config), _) => Ok(config),
        (None, Declare::Create) => {
            make_stream(link, kept(&names.stream, &names.subject, RetentionPolicy::WorkQueue)).await
        }
        (None, Declare::Check) => Err(refused(format!(
            "the stream `{}` is missing: make it (nats stream add {0} --subjects '{}'), name another with \
             `nats.stream`, or let it be made with `declare`",
            names.stream, names.subject
        ))),
    }
}

pub(super) async fn stream_config(link: &Link, stream: &str) -> Result<Option<stream::Config>, BrokerError> {
    Ok(stream_info(link, stream).await?.map(|info| info.config))
}

pub(super) async fn stream_info(link: &Link, stream: &str) -> Result<Option<stream::Info>, BrokerError> {
    match link.jetstream.get_stream(stream).await {
        Ok(found) => Ok(Some(found.cached_info().clone())),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(said) if said.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                Ok(None)
            }
            GetStreamErrorKind::JetStream(said) => {
                Err(said_no(&format!("look up the stream `{stream}`"), said))
            }
            _ => Err(no_answer(
                &format!("look up the stream `{stream}`"),
                &format!("STREAM.INFO.{stream}"),
                error,
            )),
        },
    }
}

/// Kept in files. A queue's stream forgets what is acked; one for dead letters keeps all.
fn kept(name: &str, subject: &str, retention: RetentionPolicy) -> stream::Config {
    stream::Config {
        name: name.to_owned(),
        subjects: vec![subject.to_owned()],
        retention,
        allow_direct: true,
        ..stream::Config::default()
    }
}

pub(super) async fn make_stream(link: &Link, config: stream::Config) -> Result<stream::Config, BrokerError> {
    let name = &config.name.clone();
    let subject = &config.subjects.first().cloned().unwrap_or_default();
    let act = || format!("make the stream `{name}` for the subject `{subject}`");
    let error = match link.jetstream.create_stream(config).await {
        Ok(made) => return Ok(made.cached_info().config.clone()),
        Err(error) => error,
    };
    match error.kind() {
        // Somebody was faster.
        CreateStreamErrorKind::JetStream(said) if said.error_code() == ErrorCode::STREAM_NAME_EXIST => {
            stream_config(link, name).await?.ok_or_else(|| said_no(&act(), said))
        }
        CreateStreamErrorKind::JetStream(said) if said.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP => {
            let other = stream_keeping(link, subject).await?.unwrap_or_else(|| "?".to_owned());
            Err(refused(format!(
                "the subject `{subject}` is kept by the stream `{other}` already: name it with `nats.stream`"
            )))
        }
        CreateStreamErrorKind::JetStream(said) => Err(said_no(&act(), said)),
        _ => Err(no_answer(&act(), &format!("STREAM.CREATE.{name}"), error)),
    }
}

fn check_stream(config: &stream::Config, names: &Names) -> Result<(), BrokerError> {
    let subjects = &config.subjects;
    // A mirror's or sourced stream's subjects are those of its origin.
    let of_its_own =
        config.mirror.is_none() && config.sources.is_none() && config.subject_transform.is_none();
    if of_its_own && !subjects.iter().any(|kept| overlap(kept, &names.subject)) {
        return Err(refused(format!(
            "the stream `{}` does not keep the subject `{}` (it keeps {subjects:?}): name another with \
             `nats.subject` or `nats.stream`",
            names.stream, names.subject
        )));
    }
    Ok(())
}

async fn find_or_make_durable(link: &Link, names: &Names, spec: &QueueSpec) -> Result<Info, BrokerError> {
    let Names { stream, durable, .. } = names;
    match (durable_info(link, names).await?, spec.declare) {
        (Some(info), _) => Ok(info),
        (None, Declare::Create) => make_durable(link, names, spec, MAX_ACK_PENDING).await,
        (None, Declare::Check) => Err(refused(format!(
            "the durable `{durable}` of the stream `{stream}` is missing: make it (nats consumer add {stream} \
             {durable} --pull --ack explicit --max-deliver -1 --wait {:?} --filter '{}'), or let it be made \
             with `declare`",
            ack_wait(spec),
            names.subject
        ))),
    }
}

pub(super) async fn durable_info(link: &Link, names: &Names) -> Result<Option<Info>, BrokerError> {
    let Names { stream, durable, .. } = names;
    let act = || format!("look up the durable `{durable}` of the stream `{stream}`");
    let api = format!("CONSUMER.INFO.{stream}.{durable}");
    let stream =
        link.jetstream.get_stream_no_info(stream).await.map_err(|error| no_answer(&act(), &api, error))?;
    match stream.consumer_info(durable).await {
        Ok(info) => Ok(Some(info)),
        Err(error) => match error.kind() {
            ConsumerInfoErrorKind::NotFound | ConsumerInfoErrorKind::StreamNotFound => Ok(None),
            ConsumerInfoErrorKind::JetStream(said) => Err(said_no(&act(), said)),
            _ => Err(no_answer(&act(), &api, error)),
        },
    }
}

pub(super) async fn make_durable(
    link: &Link,
    names: &Names,
    spec: &QueueSpec,
    max_ack_pending: i64,
) -> Result<Info, BrokerError> {
    let Names { stream, subject, durable } = names;
    let config = pull::Config {
        durable_name: Some(durable.clone()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: ack_wait(spec),
        max_deliver: -1,
        max_ack_pending,
        // The plural is newer than 2.9, which would ignore it and deliver everything.
        filter_subject: subject.clone(),
        ..pull::Config::default()
    };
    let act = || format!("make the durable `{durable}` of the stream `{stream}`");
    match link.jetstream.create_consumer_on_stream(config, stream).await {
        Ok(made) => Ok(made.cached_info().clone()),
        Err(error) => match error.kind() {
            ConsumerErrorKind::JetStream(said) => Err(said_no(&act(), said)),
            _ => Err(no_answer(&act(), &format!("CONSUMER.CREATE.{stream}.{durable}.{subject}"), error)),
        },
    }
}

fn ack_wait(spec: &QueueSpec) -> Duration {
    spec.nats.ack_wait.unwrap_or(spec.heartbeat * HEARTBEATS_PER_ACK_WAIT)
}

/// Refuses a durable under which a promise would not hold, naming every reason. It is read back
/// after it was made, too: a server ignores what it does not know.
pub(super) fn check_durable(
    config: &consumer::Config,
    stream: &stream::Config,
    names: &Names,
    spec: &QueueSpec,
) -> Result<(), BrokerError> {
    let wrong: Vec<String> = [
        wrong_kind(config),
        wrong_filter(config, stream, names),
        wrong_deliveries(config),
        wrong_ack_wait(config, spec),
        wrong_ack_pending(config, spec),
    ]
    .into_iter()
    .flatten()
    .collect();
    if wrong.is_empty() {
        return Ok(());
    }
    let Names { stream, durable, .. } = names;
    Err(refused(format!(
        "the durable `{durable}` of the stream `{stream}` will not do: {}. Change it (nats consumer edit {stream} \
         {durable}), or delete it and let it be made",
        wrong.join("; ")
    )))
}

fn wrong_kind(config: &consumer::Config) -> Option<String> {
    let what = if config.deliver_subject.is_some() {
        "it is a push consumer, a pull consumer is needed"
    } else if config.ack_policy != AckPolicy::Explicit {
        "its ack policy is not explicit, so one ack would settle other messages"
    } else if config.headers_only {
        "it delivers headers only"
    } else if config.priority_policy != PriorityPolicy::None {
        "it has priority groups, which are not supported"
    } else {
        return None;
    };
    Some(what.to_owned())
}

fn wrong_filter(config: &consumer::Config, stream: &stream::Config, names: &Names) -> Option<String> {
    let one = Some(&config.filter_subject).filter(|filter| !filter.is_empty());
    let filters: Vec<&String> = one.into_iter().chain(&config.filter_subjects).collect();
    let asked = &names.subject;
    let is_asked = match filters[..] {
        [] => stream.subjects.len() == 1 && stream.subjects[0] == *asked,
        [filter] => filter == asked,
        _ => false,
    };
    (!is_asked).then(|| {
        let filters = if filters.is_empty() { "nothing".to_owned() } else { format!("{filters:?}") };
        format!("it filters by {filters}, not by `{asked}`: name the subject with `nats.subject`")
    })
}

fn wrong_deliveries(config: &consumer::Config) -> Option<String> {
    (config.max_deliver > 0).then(|| {
        format!(
            "its max_deliver is {}, must be -1: waits and drains spend deliveries, and then the message is \
             stranded, neither delivered nor dead-lettered",
            config.max_deliver
        )
    })
}

fn wrong_ack_wait(config: &consumer::Config, spec: &QueueSpec) -> Option<String> {
    if let Some(asked) =
        spec.nats.ack_wait.filter(|asked| *asked != config.ack_wait && config.backoff.is_empty())
    {
        return Some(format!("its ack_wait is {:?}, not {asked:?}", config.ack_wait));
    }
    let shortest = shortest_wait(config);
    let least = spec.heartbeat * FEWEST_HEARTBEATS_PER_ACK_WAIT;
    (spec.nats.ack_wait.is_none() && *shortest < least).then(|| {
        format!("its ack_wait (or backoff) is {shortest:?}, at least {least:?} are needed for a heartbeat each {:?}", spec.heartbeat)
    })
}

/// With a backoff the server waits by that, in place of `ack_wait`.
fn shortest_wait(config: &consumer::Config) -> &Duration {
    config.backoff.iter().min().unwrap_or(&config.ack_wait)
}

fn wrong_ack_pending(config: &consumer::Config, spec: &QueueSpec) -> Option<String> {
    let (limit, prefetch) = (config.max_ack_pending, i64::from(spec.prefetch));
    (limit > 0 && limit < prefetch)
        .then(|| format!("its max_ack_pending is {limit}, less than the prefetch of {prefetch}"))
}

/// Makes or checks the stream that keeps the dead letters.
pub(super) async fn dead_letters(link: &Link, spec: &QueueSpec) -> Result<(), BrokerError> {
    let Some(place) = &spec.dead_letter else { return Ok(()) };
    let subject = place.name();
    if !is_concrete(subject) {
        return Err(refused(format!(
            "`{subject}` cannot be a dead-letter destination: a subject without wildcards"
        )));
    }
    let names = Names::of(spec)?;
    if overlap(subject, &names.subject) {
        return Err(refused(format!(
            "dead letters for `{subject}` would come back to the queue, which takes `{}`",
            names.subject
        )));
    }
    match (stream_keeping(link, subject).await?, spec.declare) {
        (Some(stream), _) => check_keeps(link, place, &stream).await,
        (None, Declare::Create) => {
            make_stream(link, kept(&legal(subject), subject, RetentionPolicy::Limits)).await.map(drop)
        }
        (None, Declare::Check) if spec.allow_missing_dead_letter => Ok(()),
        (None, Declare::Check) => Err(refused(format!(
            "no stream keeps the dead-letter subject `{subject}`: make one (nats stream add {} --subjects \
             '{subject}'), let it be made with `declare`, or allow it to be missing",
            legal(subject)
        ))),
    }
}

pub(super) async fn stream_keeping(link: &Link, subject: &str) -> Result<Option<String>, BrokerError> {
    match link.jetstream.stream_by_subject(subject).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            GetStreamByNameErrorKind::NotFound => Ok(None),
            GetStreamByNameErrorKind::JetStream(said) => {
                Err(said_no(&format!("find the stream of the subject `{subject}`"), said))
            }
            _ => {
                Err(no_answer(&format!("find the stream of the subject `{subject}`"), "STREAM.NAMES", error))
            }
        },
    }
}

/// What the stream, the durable and the dead letters' stream say of themselves.
pub(super) async fn facts(link: &Link, spec: &QueueSpec) -> Result<Facts, BrokerError> {
    let dead_letters = match &spec.dead_letter {
        Some(place) => limits(link, stream_keeping(link, place.name()).await?).await?,
        None => Kept::default(),
    };
    if spec.nats.core {
        let rejected = Some("core NATS knows no such thing, and the message is lost");
        return Ok(Facts { dead_letters, rejected, ..Facts::default() });
    }
    let names = Names::of(spec)?;
    let source = limits(link, Some(names.stream.clone())).await?;
    let durable = durable_info(link, &names).await?.map(|info| info.config);
    Ok(Facts {
        ack_wait: durable.as_ref().map(|durable| *shortest_wait(durable)),
        max_ack_pending: durable.map(|durable| durable.max_ack_pending).filter(|limit| *limit > 0),
        source,
        dead_letters,
        rejected: Some(
            "`+TERM` ends it, and it is gone from the durable (from a work queue's stream altogether)",
        ),
        ..Facts::default()
    })
}

async fn limits(link: &Link, stream: Option<String>) -> Result<Kept, BrokerError> {
    let Some(stream) = stream else { return Ok(Kept::default()) };
    let Some(config) = stream_config(link, &stream).await? else { return Ok(Kept::default()) };
    let limit = |limit: i64| Some(limit).filter(|limit| *limit > 0);
    Ok(Kept {
        max_age: Some(config.max_age).filter(|age| !age.is_zero()),
        max_messages: limit(config.max_messages),
        max_messages_per_subject: limit(config.max_messages_per_subject),
        max_bytes: limit(config.max_bytes),
        refuses_when_full: config.discard == DiscardPolicy::New,
    })
}

/// A confirmation must mean that the copy is kept.
async fn check_keeps(link: &Link, place: &Destination, stream: &str) -> Result<(), BrokerError> {
    let Some(config) = stream_config(link, stream).await? else { return Ok(()) };
    let why = match config.retention {
        _ if config.no_ack => "it confirms nothing (no_ack)",
        RetentionPolicy::Interest => "by interest it confirms what nobody reads, and drops it",
        _ => return Ok(()),
    };
    let what = format!("the stream `{stream}` cannot keep the dead letters for `{}`: {why}", place.name());
    Err(refused(what))
}

pub(super) fn refused(what: impl Into<String>) -> BrokerError {
    BrokerError::new(BrokerErrorKind::Refused, what)
}

/// The server answered, and the answer is no. It says 503 while a cluster has no leader.
pub(super) fn said_no(act: &str, error: jetstream::Error) -> BrokerError {
    let kind = if error.code() == 503 { BrokerErrorKind::Unreachable } else { BrokerErrorKind::Refused };
    BrokerError::new(kind, format!("JetStream refuses to {act}")).with_source(error)
}

/// The server answers nothing to a question that a user may not ask, so the permission it may lack is named.
pub(super) fn no_answer(act: &str, api: &str, error: impl Into<crate::BoxError>) -> BrokerError {
    let error = error.into();
    if let Some(said) = error_chain(&*error).find_map(|error| error.downcast_ref::<jetstream::Error>()) {
        return said_no(act, said.clone());
    }
    let nobody = error_chain(&*error).any(|error| {
        let asked = error.downcast_ref::<RequestError>().map(RequestError::kind);
        let sent = error.downcast_ref::<client::RequestError>().map(client::RequestError::kind);
        asked == Some(RequestErrorKind::NoResponders) || sent == Some(client::RequestErrorKind::NoResponders)
    });
    let hint = if nobody {
        "JetStream is not enabled for this account".to_owned()
    } else {
        format!(
            "the server does not answer, as when this user may not publish to `$JS.API.{api}` or read its inbox"
        )
    };
    BrokerError::new(BrokerErrorKind::Unreachable, format!("cannot {act}: {hint}")).with_source(error)
}

fn error_chain<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_legal_or_refused() {
        let mut spec = QueueSpec::new("shop.charges v2/*");
        let names = Names::of(&spec);
        assert!(names.is_err(), "a subject with a space");
        spec.nats.subject = Some("shop.charges.*".into());
        assert_eq!(Names::of(&spec).unwrap().durable, "shop_charges_v2__");
        for stream in ["a.b", "a b", "*", ">", "a/b", "é"] {
            spec.nats.stream = Some(stream.into());
            assert!(Names::of(&spec).unwrap_err().to_string().contains(stream));
        }
        assert!(Names::of(&QueueSpec::new("")).is_err());
        assert!(Names::of(&QueueSpec::new("a..b")).is_err());
    }

    #[test]
    fn subjects_overlap_if_a_message_can_match_both() {
        for (one, other) in [("a", "a"), ("a.*", "a.b"), ("a.>", "a.b.c"), ("*.b", "a.*"), (">", "a.b")] {
            assert!(overlap(one, other) && overlap(other, one), "{one} {other}");
        }
        for (one, other) in [("a", "b"), ("a", "a.b"), ("a.>", "a"), ("a.*", "a.b.c"), ("a.b", "a.c")] {
            assert!(!overlap(one, other) && !overlap(other, one), "{one} {other}");
        }
    }

    #[test]
    fn without_a_filter_the_streams_one_subject_is_what_is_asked_for() {
        let names = Names::of(&QueueSpec::new("q")).unwrap();
        let stream = |subjects: &[&str]| stream::Config {
            subjects: subjects.iter().map(ToString::to_string).collect(),
            ..stream::Config::default()
        };
        let durable = consumer::Config::default();
        assert_eq!(wrong_filter(&durable, &stream(&["q"]), &names), None);
        assert!(wrong_filter(&durable, &stream(&["q", "r"]), &names).is_some());
        assert!(wrong_filter(&durable, &stream(&[">"]), &names).is_some());
        let durable = consumer::Config { filter_subjects: vec!["q".into()], ..durable };
        assert_eq!(wrong_filter(&durable, &stream(&["q", "r"]), &names), None);
    }

    #[test]
    fn only_a_concrete_subject_can_be_published_to() {
        assert!(is_concrete("a.b") && is_concrete("a*"));
        for subject in ["", "a.", "a b", "a.*", "a.>", "a\r\nb"] {
            assert!(!is_concrete(subject), "{subject}");
        }
    }
}
