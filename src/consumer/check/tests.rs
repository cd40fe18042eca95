//! One test for each row of the table: what is found one step beyond the number, and nothing at it.

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

fn safe() -> Settings {
    let mut config = QueueConfig::new("q".into());
    config.spec.dead_letter = Some("q.dead".into());
    Settings::of(&config, Some(defaults::DRAIN))
}

/// What is found, and that it names each of these: both numbers, the setting, the fix.
fn found(settings: &Settings, facts: &Facts, severity: Severity, names: &[&str]) {
    let findings = findings("q", settings, facts);
    let [finding] = &findings[..] else { panic!("one finding, not {findings:?}") };
    assert_eq!(finding.severity, severity, "{finding}");
    for name in names {
        assert!(finding.message.contains(name), "`{name}` is not in: {finding}");
    }
}

fn warned(settings: &Settings, names: &[&str]) {
    found(settings, &Facts::default(), Severity::Warn, names);
}

fn warned_by(facts: &Facts, names: &[&str]) {
    found(&safe(), facts, Severity::Warn, names);
}

fn nothing(settings: &Settings, facts: &Facts) {
    assert_eq!(findings("q", settings, facts), []);
}

fn fine(settings: &Settings) {
    nothing(settings, &Facts::default());
}

fn fine_by(facts: &Facts) {
    nothing(&safe(), facts);
}

#[test]
fn the_defaults_are_fine() {
    fine(&safe());
    fine_by(&Facts { ack_wait: Some(30 * SECOND), max_ack_pending: Some(100_000), ..Facts::default() });
    fine_by(&Facts { delivery_timeout: Some(30 * MINUTE), ..Facts::default() });
}

#[test]
fn no_attempts_are_refused_and_few_are_warned_about() {
    let attempts = |max_attempts| Settings { max_attempts, ..safe() };
    found(&attempts(0), &Facts::default(), Severity::Refuse, &["max_attempts is 0", "at least 1"]);
    warned(&attempts(2), &["max_attempts is 2", "fewer than 3", "allow 3"]);
    fine(&attempts(3));
}

#[test]
fn a_timeout_longer_than_max_run() {
    let with = |timeout| Settings { timeout: Some(timeout), drain: None, ..safe() };
    warned(&with(16 * MINUTE), &["timeout of 960s", "max_run, 900s", "raise max_run"]);
    fine(&with(15 * MINUTE));
}

#[test]
fn all_tries_longer_than_max_run() {
    let with = |tries| Settings { timeout: Some(7 * MINUTE), tries, drain: None, ..safe() };
    warned(&with(3), &["3 tries", "420s each", "up to 1260.", "max_run, 900s", "lower tries"]);
    fine(&with(2));
    let pauses = Settings { timeout: Some(450 * SECOND), ..with(2) };
    warned(&pauses, &["up to 900.05s", "max_run, 900s"]);
}

#[test]
fn a_lease_shorter_than_a_store_may_take() {
    let with = |lease| Settings { lease, ..safe() };
    warned(&with(Duration::from_millis(999)), &["lease of 999ms", "shorter than 1s", "lengthen"]);
    fine(&with(SECOND));
}

#[test]
fn a_lease_longer_than_max_run() {
    let with = |max_run| Settings { max_run, ..safe() };
    warned(&with(29 * SECOND), &["lease of 30s", "max_run, 29s", "shorten the lease"]);
    fine(&with(30 * SECOND));
}

#[test]
fn a_wait_longer_than_the_lease() {
    let with = |wait| Settings { wait: Some(wait), ..safe() };
    warned(&with(31 * SECOND), &["wait of 31s", "lease, 30s", "shorten it"]);
    fine(&with(30 * SECOND));
}

#[test]
fn a_drain_shorter_than_the_timeout() {
    let with = |drain| Settings { timeout: Some(31 * SECOND), drain, ..safe() };
    warned(&with(Some(30 * SECOND)), &["drain of 30s", "timeout, 31s", "lengthen the drain"]);
    fine(&with(Some(31 * SECOND)));
    fine(&with(None));
}

#[test]
fn a_window_shorter_than_the_longest_backoff() {
    let with = |window| Settings { window, ..safe() };
    warned(&with(299 * SECOND), &["window of 299s", "longest backoff, 300s", "lengthen the window"]);
    fine(&with(300 * SECOND));
}

#[test]
fn a_window_shorter_than_ack_wait() {
    let with = |ack_wait| Facts { ack_wait: Some(ack_wait), ..Facts::default() };
    warned_by(&with(61 * MINUTE), &["window of 3600s", "ack_wait, 3660s", "lengthen the window"]);
    fine_by(&with(60 * MINUTE));
}

#[test]
fn a_window_shorter_than_max_age() {
    let with = |max_age| Settings { max_age: Some(max_age), ..safe() };
    warned(&with(61 * MINUTE), &["window of 3600s", "max_age, 3660s", "lengthen the window"]);
    fine(&with(60 * MINUTE));
}

#[test]
fn runs_and_holds_longer_than_the_broker_waits() {
    let facts = Facts { delivery_timeout: Some(30 * MINUTE), ..Facts::default() };
    let run = Settings { max_run: 30 * MINUTE, ..safe() };
    found(
        &run,
        &facts,
        Severity::Warn,
        &["max_run is 1800s", "after 1800s", "x-consumer-timeout", "shorten max_run"],
    );
    let hold = Settings { pause_hold: 31 * MINUTE, ..safe() };
    found(&hold, &facts, Severity::Warn, &["pause_hold is 1860s", "after 1800s"]);
    nothing(&Settings { max_run: 29 * MINUTE, ..safe() }, &facts);
    fine(&run);
}

#[test]
fn an_ack_wait_of_few_heartbeats() {
    let with = |ack_wait| Facts { ack_wait: Some(ack_wait), ..Facts::default() };
    let names = ["ack_wait is 19s", "2 heartbeats of 10s", "set ack_wait to 30s"];
    found(&safe(), &with(19 * SECOND), Severity::Refuse, &names);
    warned_by(&with(29 * SECOND), &["ack_wait is 29s", "3 heartbeats of 10s", "set ack_wait to 30s"]);
    warned_by(&with(20 * SECOND), &["ack_wait is 20s", "3 heartbeats of 10s"]);
    fine_by(&with(30 * SECOND));
}

#[test]
fn a_small_max_ack_pending() {
    let with = |limit| Facts { max_ack_pending: Some(limit), ..Facts::default() };
    warned_by(&with(999), &["max_ack_pending is 999", "less than 1000", "raise it"]);
    fine_by(&with(1000));
}

#[test]
fn a_stream_that_drops_messages_before_their_last_attempt() {
    let with =
        |max_age| Facts { source: Kept { max_age: Some(max_age), ..Kept::default() }, ..Facts::default() };
    // 1 s, 4 s, 16 s and 64 s between five attempts.
    warned_by(&with(84 * SECOND), &["after 84s", "5 attempts take 85s", "raise max_age"]);
    fine_by(&with(85 * SECOND));
}

#[test]
fn the_horizon_is_the_sum_of_all_backoffs() {
    let horizon = |max_attempts| Settings { max_attempts, ..safe() }.horizon();
    assert_eq!((horizon(0), horizon(1), horizon(2)), (Duration::ZERO, Duration::ZERO, SECOND));
    assert_eq!(horizon(7), (1 + 4 + 16 + 64 + 256 + 300) * SECOND);
    assert_eq!(
        horizon(u32::MAX),
        341 * SECOND + (u32::MAX - 6) * (300 * SECOND),
        "and it does not count them one by one"
    );
}

#[test]
fn a_full_stream_that_drops_what_was_not_handled() {
    let with = |refuses_when_full| {
        let source = Kept { max_messages: Some(500), refuses_when_full, ..Kept::default() };
        Facts { source, ..Facts::default() }
    };
    warned_by(&with(false), &["oldest messages at 500 messages", "discard new"]);
    fine_by(&with(true));
}

#[test]
fn dead_letters_that_are_dropped() {
    let with = |dead_letters| Facts { dead_letters, ..Facts::default() };
    warned_by(&with(Kept { max_age: Some(MINUTE), ..Kept::default() }), &["dropped after 60s", "raise it"]);
    let full = Kept { max_bytes: Some(1024), max_messages_per_subject: Some(7), ..Kept::default() };
    warned_by(&with(full.clone()), &["at 7 messages of one subject or 1024 bytes", "discard new"]);
    fine_by(&with(Kept { refuses_when_full: true, ..full }));
}

#[test]
fn failed_messages_that_are_left_to_the_broker() {
    let rejecting = Settings { rejects: true, dead_letters: false, ..safe() };
    let facts = Facts { rejected: Some("to nobody"), ..Facts::default() };
    found(&rejecting, &facts, Severity::Warn, &["reject_failed", "to nobody", "name a dead_letter"]);
    let both = Settings { rejects: true, ..safe() };
    found(&both, &facts, Severity::Warn, &["both set", "remove reject_failed"]);
}

#[test]
fn what_is_refused_comes_first() {
    let settings = Settings { max_attempts: 0, lease: Duration::from_millis(1), ..safe() };
    let severities: Vec<_> =
        findings("q", &settings, &Facts::default()).iter().map(|finding| finding.severity).collect();
    assert_eq!(severities, [Severity::Refuse, Severity::Warn]);
}
