//! Copies: what they carry, and when they count as kept.

use std::str::FromStr as _;
use std::time::Duration;

use async_nats::client::{Request, RequestError, RequestErrorKind};
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::{Client, HeaderMap, HeaderName, HeaderValue, header};
use bytes::Bytes;

use super::again;
use super::connect::Link;
use super::topology::is_concrete;
use crate::broker::{BrokerError, BrokerErrorKind, Copy, Destination, copy};
use crate::dead_letter::Redact;

/// How a copy is published, beside what it is.
pub(super) struct Marked<'a> {
    /// What the stream knows it by within its duplicate window.
    pub(super) id: &'a str,
    /// Headers of ours, and those that the server is to act on.
    pub(super) marks: Vec<(&'static str, String)>,
    /// The stream that is to keep it: another one refuses it.
    pub(super) stream: Option<String>,
}

impl<'a> Marked<'a> {
    /// A copy under its own id.
    ///
    /// # Errors
    ///
    /// The subject is one of ours, for which there can be no stream.
    pub(super) fn plain(copy: &'a Copy<'_>, to: &Destination) -> Result<Self, BrokerError> {
        Ok(Self { id: copy.id(), marks: Vec::new(), stream: again::keeper(to.name())? })
    }
}

/// Publishes a copy to a subject, of ours where it makes a difference: a publish that is not permitted is never answered,
/// and would be taken for one that may be repeated.
pub(super) async fn permitted(
    link: &Link,
    limit: Duration,
    subject: &str,
    copy: &Copy<'_>,
    marked: Marked<'_>,
) -> Result<(), BrokerError> {
    if marked.stream.is_none() {
        return publish(&link.client, limit, subject, copy, marked).await;
    }
    tokio::select! {
        biased;
        subject = link.denial(subject) => {
            let what = format!("this user may not publish to `{subject}`");
            Err(BrokerError::new(BrokerErrorKind::Refused, what))
        }
        put = publish(&link.client, limit, subject, copy, marked) => put,
    }
}

/// Publishes a copy. `Ok` means that a stream has it.
async fn publish(
    client: &Client,
    limit: Duration,
    subject: &str,
    copy: &Copy<'_>,
    marked: Marked<'_>,
) -> Result<(), BrokerError> {
    if !is_concrete(subject) {
        let what = format!("`{subject}` cannot be published to: a subject without wildcards is needed");
        return Err(BrokerError::new(BrokerErrorKind::Refused, what));
    }
    let letterbox = Letterbox { client, limit, subject, marked };
    letterbox.put_once(copy).await
}

struct Letterbox<'a> {
    client: &'a Client,
    limit: Duration,
    subject: &'a str,
    marked: Marked<'a>,
}

impl Letterbox<'_> {
    /// Publishes under the copy's own id. The stream takes a second one with this id for a
    /// duplicate even if the first is gone from it: then under a fresh id.
    async fn put_once(&self, copy: &Copy<'_>) -> Result<(), BrokerError> {
        let (headers, id) = (self.headers(copy), self.marked.id);
        let ack = self.put(copy, &headers, id).await?;
        if !ack.duplicate || self.keeps(&ack).await? {
            return Ok(());
        }
        let fresh = format!("{id}-{:016x}", rand::random::<u64>());
        if self.put(copy, &headers, &fresh).await?.duplicate {
            return Err(self.unknown("the stream takes a fresh copy for a duplicate"));
        }
        Ok(())
    }

    fn headers(&self, copy: &Copy<'_>) -> HeaderMap {
        let mut headers = headers(copy);
        for (name, mark) in &self.marked.marks {
            headers.insert(*name, value(mark));
        }
        if let Some(stream) = &self.marked.stream {
            headers.insert(header::NATS_EXPECTED_STREAM, value(stream));
        }
        headers
    }

    async fn put(&self, copy: &Copy<'_>, headers: &HeaderMap, id: &str) -> Result<PublishAck, BrokerError> {
        let mut headers = headers.clone();
        headers.insert(header::NATS_MESSAGE_ID, value(id));
        let payload = copy.body();
        self.check_size(&headers, &payload)?;
        let request = Request::new().headers(headers).payload(payload).timeout(Some(self.limit));
        let answer = self.client.send_request(self.subject.to_owned(), request).await;
        self.read(&answer.map_err(|error| self.unconfirmed(error))?.payload)
    }

    fn check_size(&self, headers: &HeaderMap, payload: &Bytes) -> Result<(), BrokerError> {
        let (size, most) = (wire_len(headers) + payload.len(), self.client.max_payload());
        if size <= most {
            return Ok(());
        }
        let what = format!("the copy has {size} bytes, the server takes at most {most} (max_payload)");
        Err(BrokerError::new(BrokerErrorKind::TooLarge, what))
    }

    fn read(&self, answer: &[u8]) -> Result<PublishAck, BrokerError> {
        match serde_json::from_slice(answer) {
            Ok(Response::Ok(ack)) => Ok(ack),
            Ok(Response::Err { error })
                if error.error_code() == ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM =>
            {
                let what = format!("the stream of `{}` takes no copy as large as this", self.subject);
                Err(BrokerError::new(BrokerErrorKind::TooLarge, what).with_source(error))
            }
            Ok(Response::Err { error }) if error.error_code() == ErrorCode::STREAM_NOT_MATCH => {
                let stream = self.marked.stream.as_deref().unwrap_or_default();
                let what = format!(
                    "`{}` is not kept by the stream `{stream}` but by another one, which nobody pulls for it",
                    self.subject
                );
                Err(BrokerError::new(BrokerErrorKind::NotRouted, what).with_source(error))
            }
            Ok(Response::Err { error }) => {
                let what = format!("the stream of `{}` refuses the copy", self.subject);
                Err(BrokerError::new(BrokerErrorKind::Nacked, what).with_source(error))
            }
            // Any subscriber can answer; only a stream's answer means that the copy is kept.
            Err(error) => Err(self.unknown("somebody who is no stream answered").with_source(error)),
        }
    }

    /// Whether what a duplicate is a duplicate of is still there.
    async fn keeps(&self, ack: &PublishAck) -> Result<bool, BrokerError> {
        let subject = format!("$JS.API.STREAM.MSG.GET.{}", ack.stream);
        let payload = format!(r#"{{"seq":{}}}"#, ack.sequence);
        let request = Request::new().payload(payload.into()).timeout(Some(self.limit));
        let unsure = || self.unknown("the copy is said to be there, which could not be verified");
        let answer =
            self.client.send_request(subject, request).await.map_err(|error| unsure().with_source(error))?;
        match serde_json::from_slice::<Response<Stored>>(&answer.payload) {
            Ok(Response::Ok(_)) => Ok(true),
            Ok(Response::Err { error }) if error.code() == 404 => Ok(false),
            Ok(Response::Err { error }) => Err(unsure().with_source(error)),
            Err(error) => Err(unsure().with_source(error)),
        }
    }

    fn unconfirmed(&self, error: RequestError) -> BrokerError {
        let (kind, why) = match error.kind() {
            RequestErrorKind::NoResponders if self.marked.stream.is_some() => (
                BrokerErrorKind::NotRouted,
                "the durable has no stream of its own; its consumer makes it at its start, where it may",
            ),
            RequestErrorKind::NoResponders => (BrokerErrorKind::NotRouted, "no stream keeps this subject"),
            RequestErrorKind::MaxPayloadExceeded => {
                (BrokerErrorKind::TooLarge, "it is larger than max_payload")
            }
            RequestErrorKind::InvalidSubject => (BrokerErrorKind::Refused, "it is no subject"),
            RequestErrorKind::TimedOut => (BrokerErrorKind::Unknown, "no answer in time"),
            RequestErrorKind::Other => (BrokerErrorKind::Unknown, "the connection failed"),
        };
        BrokerError::new(kind, format!("the copy to `{}` is not confirmed: {why}", self.subject))
            .with_source(error)
    }

    fn unknown(&self, why: &str) -> BrokerError {
        let what = format!("the copy to `{}` is not confirmed: {why}", self.subject);
        BrokerError::new(BrokerErrorKind::Unknown, what)
    }
}

/// Only that it is there counts.
#[derive(serde::Deserialize)]
struct Stored {
    #[serde(rename = "message")]
    _message: serde::de::IgnoredAny,
}

/// The copy's headers, without its id.
fn headers(copy: &Copy<'_>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut moved = Vec::new();
    for (name, raw) in copy.message().headers().iter() {
        let Some(plain) = plain(name, raw) else {
            moved.push((format!("{}{name}", copy::MOVED_HEADER), raw.clone()));
            continue;
        };
        match copy.redact(name, || raw.clone()) {
            Redact::Keep => append(&mut headers, name, plain),
            Redact::Remove => {}
            Redact::Replace(text) => append(&mut headers, name, value(&text)),
        }
    }
    if let Some(content_type) = copy.message().content_type().filter(|_| !has_content_type(copy)) {
        append(&mut headers, super::CONTENT_TYPE, value(content_type));
    }
    for (name, text) in copy.headers().into_iter().chain(copy.moved(moved)) {
        append(&mut headers, &name, value(&text));
    }
    headers
}

/// The header's value, if it can travel as it is. What the server acts on cannot, nor what would
/// break the frame (and makes the client panic), nor spaces that the receiving client trims.
fn plain(name: &str, raw: &Bytes) -> Option<HeaderValue> {
    let text = std::str::from_utf8(raw).ok()?;
    let trimmed = text.trim().len() != text.len();
    if acted_on(name) || trimmed { None } else { HeaderValue::from_str(text).ok() }
}

/// Whether it is a header that the server acts on, whatever its case.
pub(super) fn acted_on(name: &str) -> bool {
    name.get(..5).is_some_and(|prefix| prefix.eq_ignore_ascii_case("nats-"))
}

/// A value of ours: text that is escaped or encoded already, so nothing is lost here.
fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text)
        .unwrap_or_else(|_| HeaderValue::from_str(&copy::encode(text.as_bytes())).unwrap_or_default())
}

/// A name that no NATS client could read (a space, a colon, not ASCII, none at all) would end
/// every connection that the copy is delivered to.
fn append(headers: &mut HeaderMap, name: &str, value: HeaderValue) {
    match HeaderName::from_str(name) {
        Ok(name) if !AsRef::<str>::as_ref(&name).is_empty() => headers.append(name, value),
        _ => tracing::warn!(
            name = copy::encode(name.as_bytes()),
            "a header that NATS cannot carry is left out of a copy"
        ),
    }
}

fn has_content_type(copy: &Copy<'_>) -> bool {
    copy.message().headers().iter().any(|(name, _)| name.eq_ignore_ascii_case(super::CONTENT_TYPE))
}

/// As the client writes them: a first line, a line for each, an empty one.
fn wire_len(headers: &HeaderMap) -> usize {
    let line =
        |name: &HeaderName, value: &HeaderValue| AsRef::<str>::as_ref(name).len() + value.as_str().len() + 4;
    let lines = headers.iter().flat_map(|(name, values)| values.iter().map(move |value| line(name, value)));
    "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Message;

    fn copied(message: &Message) -> HeaderMap {
        headers(&Copy::hold(message))
    }

    #[test]
    fn what_the_server_acts_on_is_moved_aside_whatever_its_case() {
        let message = Message::builder("")
            .header("Nats-Rollup", "all")
            .header("nats-ttl", "1s")
            .header("Natsy", "kept")
            .build();
        let copy = copied(&message);
        assert!(copy.get("Nats-Rollup").is_none() && copy.get("nats-ttl").is_none());
        assert_eq!(copy.get("guestlist-orig-h-%4Eats-Rollup").unwrap().as_str(), "all");
        assert_eq!(copy.get("guestlist-orig-h-%6Eats-ttl").unwrap().as_str(), "1s");
        assert_eq!(copy.get("Natsy").unwrap().as_str(), "kept");
    }

    #[test]
    fn values_that_cannot_travel_come_back_as_they_were() {
        let odd: [&'static [u8]; 7] = [b"a\r\nb", b"\n", b"\r", b"\xff", b" edge ", b"\t", b"\xc2\xa0nbsp"];
        for value in odd {
            let copy = copied(&Message::builder("").header("h", value).build());
            assert!(copy.get("h").is_none(), "{value:?}");
            let moved = copy.get("guestlist-orig-h-h").unwrap().as_str().to_owned();
            let back = Message::builder("").header("guestlist-orig-h-h", moved).build();
            assert_eq!(back.headers().get("h").unwrap(), value);
        }
        for value in ["", "\0", "naïve 🎉", "a: b", "two  spaces"] {
            let copy = copied(&Message::builder("").header("h", value).build());
            assert_eq!(copy.get("h").unwrap().as_str(), value);
        }
    }

    #[test]
    fn names_that_cannot_travel_are_left_out() {
        for name in ["", "a b", "a:b", "é", "a\r\nb", "\0"] {
            let copy = copied(&Message::builder("").header(name, "v").header("ok", "v").build());
            assert!(
                copy.iter()
                    .all(|(n, _)| AsRef::<str>::as_ref(n) == "ok" || n.to_string().starts_with(copy::PREFIX))
            );
            assert!(copy.get("ok").is_some());
        }
    }

    #[test]
    fn repeated_headers_stay_repeated_and_in_order() {
        let copy = copied(&Message::builder("").header("h", "1").header("h", "2").header("h", "1").build());
        let values: Vec<_> = copy.get_all("h").map(HeaderValue::as_str).collect();
        assert_eq!(values, ["1", "2", "1"]);
    }
}
