//! The line format: what is written is read, and what is wrong is named.

use std::io::Write as _;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::super::{LogWriter, What};
use super::*;

fn cause() -> impl Strategy<Value = Cause> {
    prop::sample::select(super::super::lines::CAUSES)
}

fn length() -> impl Strategy<Value = Duration> {
    (0..u64::MAX).prop_map(Duration::from_micros)
}

fn kind() -> impl Strategy<Value = EventKind> {
    let plain: Vec<EventKind> = super::super::lines::PLAIN.iter().map(|(_, kind)| *kind).collect();
    let before =
        prop::sample::select(vec![Before::First, Before::Failed, Before::HandedBack, Before::Vanished]);
    let outcome = prop::sample::select(vec![
        Outcome::Handled,
        Outcome::HandledUnrecorded,
        Outcome::HandledUnchecked,
        Outcome::Duplicate,
    ]);
    let release = prop_oneof![
        length().prop_map(|not_before| Release::Failed { not_before }),
        length().prop_map(|not_before| Release::Deferred { not_before }),
        Just(Release::NotStarted),
        Just(Release::Interrupted),
        Just(Release::DeadLettered),
    ];
    let disposition = prop_oneof![
        length().prop_map(|after| Disposition::Requeue { after }),
        length().prop_map(|after| Disposition::Release { after }),
        Just(Disposition::Reject),
        Just(Disposition::Abandon),
        Just(Disposition::Ack),
    ];
    prop_oneof![
        prop::sample::select(plain),
        before.prop_map(EventKind::Claimed),
        cause().prop_map(EventKind::Failed),
        release.prop_map(EventKind::Released),
        outcome.prop_map(EventKind::Acked),
        cause().prop_map(|cause| EventKind::Acked(Outcome::DeadLettered(cause))),
        disposition.prop_map(EventKind::Returned),
    ]
}

fn step() -> impl Strategy<Value = What> {
    let claim = prop::option::of((any::<u64>(), any::<u64>(), prop::option::of(any::<u64>())));
    let parts = (any::<u64>(), prop::option::of(any::<[u8; 16]>()), claim, any::<u32>(), any::<u32>());
    (parts, prop::option::of(any::<u32>()), prop::option::of(cause()), kind()).prop_map(
        |((delivery, key, claim, attempt, generation), body, cause, kind)| {
            let cause = cause.filter(|_| !matches!(kind, EventKind::Failed(_) | EventKind::Acked(_)));
            let claim = claim.map(|(token, fence, until)| ClaimMark { token, fence, until });
            let key = key.map(DedupKey::from_bytes);
            What::Step(Step { delivery, key, claim, attempt, generation, body, cause, kind })
        },
    )
}

fn marker() -> impl Strategy<Value = What> {
    prop_oneof![
        Just(Marker::ProcessStarted),
        Just(Marker::ProcessKilled),
        Just(Marker::StoreAway),
        Just(Marker::StoreBack),
        prop::option::of(any::<[u8; 16]>()).prop_map(|key| Marker::StoreLost(key.map(DedupKey::from_bytes))),
        Just(Marker::StoreRestarted),
        any::<i64>().prop_map(Marker::Clock),
    ]
    .prop_map(What::Marker)
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        entries in prop::collection::vec((".*", any::<u64>(), prop_oneof![step(), marker()]), 0..20)
    ) {
        let entry = |(process, at, what): (String, u64, What)| Entry { process: process.into(), at, what };
        let log = Log::from(entries.into_iter().map(entry).collect::<Vec<_>>());
        let lines = log.to_lines();
        prop_assert_eq!(lines.lines().count(), log.entries().len());
        prop_assert_eq!(Log::parse(&lines), Ok(log));
    }

    /// Wherever a kill tears the file, the lines before are read.
    #[test]
    fn a_torn_end_is_left_out(cut in 1_usize..200) {
        let lines = example().to_lines();
        let cut = cut % lines.len();
        let log = Log::parse(&lines[..cut]).unwrap();
        let whole = lines[..cut].matches('\n').count();
        let torn = lines[..cut].rsplit('\n').next().is_some_and(|rest| !rest.is_empty() && !rest.ends_with('}'));
        prop_assert_eq!(log.torn(), usize::from(torn));
        prop_assert!((whole..=whole + 1).contains(&log.entries().len()));
    }
}

fn example() -> Log {
    let mut tape = Tape::new();
    tape.arrives("a", 1).handles(Before::First, 1, 1).log()
}

/// The names are stable: other programs read and write them.
#[test]
fn a_line_looks_like_this() {
    let claim = ClaimMark::new(0xab, 17).until(130);
    let step = Step::new(3, EventKind::Claimed(Before::Vanished)).key(KEY).claim(claim);
    let step = step.attempt(2).generation(1).body(0xff);
    let log = Log::from(vec![
        Entry::step("a-1", 100, step),
        Entry::step("a-1", 101, Step::new(3, EventKind::Returned(LATER)).cause(Cause::InProgress)),
        Entry::step("a-1", 102, Step::new(3, EventKind::Acked(Outcome::DeadLettered(Cause::Exhausted)))),
        Entry::marker("store", 103, Marker::StoreLost(Some(KEY))),
        Entry::marker("b", 104, Marker::Clock(-5)),
    ]);
    let expected = r#"{"process":"a-1","at":100,"event":"claimed","delivery":3,"key":"01010101010101010101010101010101","token":"00000000000000ab","fence":17,"until":130,"attempt":2,"generation":1,"body":"000000ff","before":"vanished"}
{"process":"a-1","at":101,"event":"returned","delivery":3,"attempt":1,"generation":0,"disposition":"release","after":1000000,"cause":"in_progress"}
{"process":"a-1","at":102,"event":"acked","delivery":3,"attempt":1,"generation":0,"outcome":"dead_lettered","cause":"exhausted"}
{"process":"store","at":103,"event":"store_lost","key":"01010101010101010101010101010101"}
{"process":"b","at":104,"event":"clock","ahead":-5}
"#;
    assert_eq!(log.to_lines(), expected);
}

#[test]
fn an_error_names_the_line_and_the_field() {
    let cases = [
        ("nonsense", "line"),
        ("[]", "line"),
        (r#"{"at":1,"event":"received","delivery":1}"#, "process"),
        (r#"{"process":"a","event":"received","delivery":1}"#, "at"),
        (r#"{"process":"a","at":-1,"event":"received","delivery":1}"#, "at"),
        (r#"{"process":"a","at":1,"delivery":1}"#, "event"),
        (r#"{"process":"a","at":1,"event":"exploded","delivery":1}"#, "event"),
        (r#"{"process":"a","at":1,"event":"received"}"#, "delivery"),
        (r#"{"process":"a","at":1,"event":"identified","delivery":1,"key":"12"}"#, "key"),
        (
            r#"{"process":"a","at":1,"event":"started","delivery":1,"token":"+123456789abcdef","fence":1}"#,
            "token",
        ),
        (r#"{"process":"a","at":1,"event":"started","delivery":1,"token":"0123456789abcdef"}"#, "fence"),
        (r#"{"process":"a","at":1,"event":"started","delivery":1,"attempt":4294967296}"#, "attempt"),
        (r#"{"process":"a","at":1,"event":"claimed","delivery":1}"#, "before"),
        (r#"{"process":"a","at":1,"event":"failed","delivery":1,"cause":"moon"}"#, "cause"),
        (r#"{"process":"a","at":1,"event":"released","delivery":1,"as":"x"}"#, "as"),
        (r#"{"process":"a","at":1,"event":"acked","delivery":1,"outcome":"x"}"#, "outcome"),
        (
            r#"{"process":"a","at":1,"event":"returned","delivery":1,"disposition":"requeue","after":"1s"}"#,
            "after",
        ),
        (r#"{"process":"a","at":1,"event":"clock"}"#, "ahead"),
    ];
    for (line, field) in cases {
        let error = Log::parse(&format!("{}\n{line}\n", example().to_lines())).unwrap_err();
        assert_eq!((error.line(), error.field()), (example().entries().len() + 2, field), "{error}");
        assert!(error.to_string().contains(field));
    }
}

#[test]
fn fields_that_are_not_known_are_for_others() {
    let log = Log::parse(r#"{"process":"a","at":1,"event":"received","delivery":1,"queue":"orders"}"#);
    assert_eq!(log.unwrap().entries(), [Entry::step("a", 1, Step::new(1, EventKind::Received))]);
}

#[test]
fn a_merged_log_keeps_each_logs_order() {
    let at = |process: &'static str, at| Entry::marker(process, at, Marker::StoreBack);
    // `a`'s clock went back; `b` is known to be ahead.
    let a = Log::from(vec![at("a", 10), at("a", 5), at("a", 30)]);
    let b = Log::from(vec![Entry::marker("b", 107, Marker::Clock(100)), at("b", 120)]);
    let merged = Log::merge([a, b]);
    let order: Vec<_> = merged.entries().iter().map(|entry| (&*entry.process, entry.at)).collect();
    assert_eq!(order, [("b", 107), ("a", 10), ("a", 5), ("b", 120), ("a", 30)]);
}

#[test]
fn a_writer_goes_on_after_a_torn_line() {
    let path = std::env::temp_dir().join(format!("guestlist-log-{}.jsonl", std::process::id()));
    let _ = std::fs::remove_file(&path);
    LogWriter::append(&path, "a").unwrap().mark(Marker::StoreAway);
    let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(br#"{"process":"a","at":1"#).unwrap();
    assert_eq!((Log::read(&path).unwrap().torn(), Log::read(&path).unwrap().entries().len()), (1, 2));
    LogWriter::append(&path, "a").unwrap().mark_of("b", Marker::ProcessKilled);
    let log = Log::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let said: Vec<_> = log.entries().iter().map(|entry| (&*entry.process, entry.what.clone())).collect();
    let marker = |process, marker| (process, What::Marker(marker));
    let expected = [
        marker("a", Marker::ProcessStarted),
        marker("a", Marker::StoreAway),
        marker("a", Marker::ProcessStarted),
        marker("b", Marker::ProcessKilled),
    ];
    assert_eq!((said, log.torn()), (expected.to_vec(), 0));
}

/// A disk that is full after so many bytes.
struct Full(Arc<Mutex<Vec<u8>>>, usize);

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut written = self.0.lock().unwrap();
        if written.len() + bytes.len() > self.1 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        written.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_writer_that_fails_says_so_and_leaves_no_hole() {
    let written = Arc::new(Mutex::new(Vec::new()));
    let log = LogWriter::new(Full(Arc::clone(&written), 200), "a").unwrap();
    log.mark(Marker::StoreLost(Some(KEY)));
    assert!(log.failed().is_none());
    log.mark(Marker::StoreLost(Some(KEY)));
    log.mark(Marker::StoreBack);
    assert_eq!(log.failed().unwrap().kind(), std::io::ErrorKind::StorageFull);
    let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
    assert_eq!(Log::parse(&text).unwrap().entries().len(), 2);
    assert!(LogWriter::new(Full(written, 0), "a").is_err());
}
