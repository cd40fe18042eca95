//! What a stream keeps of one subject becomes a walk. It only asks: nothing changes at the server.

use std::time::Duration;

use async_nats::Client;
use async_nats::client::Request;
use async_nats::header;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{DeleteStatus, RawMessage};
use async_nats::jetstream::{self, ErrorCode};
use async_trait::async_trait;
use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::connect::Link;
use super::source::with_fields;
use super::topology::{is_concrete, no_answer, refused, said_no, stream_info, stream_keeping};
use crate::Message;
use crate::broker::{BrokerError, BrokerErrorKind, Destination, Letter, Letters, Place};
use crate::message::Source;

/// A walk by sequence, up to the stream's last one when it began.
pub(super) struct StreamLetters {
    client: Client,
    limit: Duration,
    stream: String,
    subject: String,
    keeps_all: bool,
    next: u64,
    last: u64,
}

/// # Errors
///
/// `Refused` for a subject with wildcards, and for one that no stream keeps.
pub(super) async fn begin(
    link: &Link,
    limit: Duration,
    at: &Destination,
) -> Result<StreamLetters, BrokerError> {
    let subject = at.name();
    if !is_concrete(subject) {
        return Err(refused(format!(
            "`{subject}` cannot be a place of dead letters: a subject without wildcards is needed"
        )));
    }
    let nobody =
        || refused(format!("no stream keeps the subject `{subject}`: check the name of the dead letters"));
    let stream = stream_keeping(link, subject).await?.ok_or_else(nobody)?;
    let info = stream_info(link, &stream).await?.ok_or_else(nobody)?;
    Ok(StreamLetters {
        client: link.client.clone(),
        limit,
        stream,
        subject: subject.to_owned(),
        keeps_all: info.config.deny_delete,
        next: 1,
        last: info.state.last_sequence,
    })
}

#[async_trait]
impl Letters for StreamLetters {
    async fn next(&mut self) -> Result<Option<Letter>, BrokerError> {
        if self.next > self.last {
            return Ok(None);
        }
        let question = serde_json::json!({ "seq": self.next, "next_by_subj": self.subject });
        let found = self.find(&question).await?.filter(|found| found.sequence <= self.last);
        self.next = found.as_ref().map_or(u64::MAX, |found| found.sequence + 1);
        found.map(|found| self.letter(&found)).transpose()
    }

    fn removable(&self) -> Result<(), BrokerError> {
        if self.keeps_all {
            return Err(refused(format!(
                "the stream `{}` lets nothing be removed: it has deny_delete, which cannot be changed",
                self.stream
            )));
        }
        Ok(())
    }

    async fn remove(&mut self, place: Place) -> Result<(), BrokerError> {
        self.removable()?;
        // Not overwritten on the disk, which takes longer: neither is what a consumer acks.
        let question = serde_json::json!({ "seq": place.0, "no_erase": true });
        match self.ask::<DeleteStatus>("DELETE", &question).await? {
            Ok(_) => Ok(()),
            // Each server has its own words for a sequence that is not there.
            Err(_) if self.find(&serde_json::json!({ "seq": place.0 })).await?.is_none() => Ok(()),
            Err(said) => Err(said_no(&format!("remove the letter {} of `{}`", place.0, self.stream), said)),
        }
    }

    async fn close(self: Box<Self>) -> Result<(), BrokerError> {
        Ok(())
    }
}

/// The answer to a question for a message.
#[derive(serde::Deserialize)]
struct Found {
    message: RawMessage,
}

impl StreamLetters {
    async fn find(&self, question: &serde_json::Value) -> Result<Option<RawMessage>, BrokerError> {
        match self.ask::<Found>("GET", question).await? {
            Ok(found) => Ok(Some(found.message)),
            Err(said) if said.error_code() == ErrorCode::NO_MESSAGE_FOUND => Ok(None),
            Err(said) => Err(said_no(&format!("show the letters of the stream `{}`", self.stream), said)),
        }
    }

    /// The inner result is the server's answer. Asked by hand: the client's own call prints every answer, payload and
    /// all, in its debug log.
    async fn ask<T: DeserializeOwned>(
        &self,
        act: &str,
        question: &serde_json::Value,
    ) -> Result<Result<T, jetstream::Error>, BrokerError> {
        let api = format!("STREAM.MSG.{act}.{}", self.stream);
        let request = Request::new().payload(question.to_string().into()).timeout(Some(self.limit));
        let what = format!("read or remove a letter of the stream `{}`", self.stream);
        let answer = self.client.send_request(format!("$JS.API.{api}"), request).await;
        let answer = answer.map_err(|error| no_answer(&what, &api, error))?;
        match serde_json::from_slice(&answer.payload) {
            Ok(Response::Ok(said)) => Ok(Ok(said)),
            Ok(Response::Err { error }) => Ok(Err(error)),
            Err(error) => Err(no_answer(&what, &api, error)),
        }
    }

    fn letter(&self, found: &RawMessage) -> Result<Letter, BrokerError> {
        let place = Place(found.sequence);
        let time = found.time;
        let mut source = Source::new(super::SYSTEM, "");
        source.stream.clone_from(&self.stream);
        source.routing_key.clone_from(&found.subject);
        source.sequence = Some(found.sequence);
        let block = found.headers.clone().map(|text| self.decoded(found, text)).transpose()?;
        let payload = self.decoded(found, found.payload.clone())?;
        let headers = block.as_deref().map(fields).unwrap_or_default();
        let id = headers.iter().find(|(name, _)| *name == header::NATS_MESSAGE_ID.as_ref());
        let fields = headers.iter().map(|(name, value)| (name.as_str(), &value[..]));
        let message =
            with_fields(Message::builder(payload), &fields).source(source).timestamp(time.into()).build();
        let lies_at = Some((self.stream.as_str(), found.sequence));
        Ok(Letter::found(id.map(|(_, value)| &value[..]), lies_at, message, place))
    }

    /// What the server wrote as base64, by the client's own reader.
    fn decoded(&self, found: &RawMessage, text: String) -> Result<Bytes, BrokerError> {
        let bare = RawMessage { payload: text, headers: None, ..found.clone() };
        let read = StreamMessage::try_from(bare).map_err(|error| {
            let what = format!(
                "the server's answer for the letter {} of `{}` cannot be read",
                found.sequence, self.stream
            );
            BrokerError::new(BrokerErrorKind::Refused, what).with_source(error)
        })?;
        Ok(read.payload)
    }
}

/// The lines of a block of headers. The client's own reader refuses all of them if it does not like one, and keeps one
/// of several values.
fn fields(block: &[u8]) -> Vec<(String, Bytes)> {
    let lines = block.split(|byte| *byte == b'\n').skip(1);
    lines.filter_map(field).collect()
}

fn field(line: &[u8]) -> Option<(String, Bytes)> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let name = std::str::from_utf8(&line[..colon]).ok()?;
    Some((name.to_owned(), Bytes::copy_from_slice(line[colon + 1..].trim_ascii())))
}
