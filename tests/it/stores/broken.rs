//! Stores that are broken on purpose, each in one way that real ones are: the contract must notice.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use guestlist::DedupKey;
use guestlist::dedup::protocol::{
    Ask, Before, Claim, Fence, Held, Machine, Micros, Record, Release, Run, State, Token,
};
use guestlist::dedup::{DedupStore, StoreError, StoreFeatures};
use guestlist::testing::store_contract::{self as contract, Pace, StoreFixture, store_contract};
use tokio::task::yield_now;
use tokio::time::Instant;

/// What is wrong with a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// Looks, then writes.
    GetThenSet,
    /// Each handle has its own.
    Unshared,
    /// The record lives as long as the lease, as by `SET key token NX PX lease`.
    LeaseIsLifetime,
    /// A claim asked again is refused, since the key is held.
    ClaimAgainIsBusy,
    ClaimAgainCountsAgain,
    ClaimAgainKeepsItsDeadline,
    LeaseIsShort,
    RenewalNeverShortens,
    AnyTokenReleases,
    AnyTokenCompletes,
    AnyTokenRenews,
    /// The fence is taken for the proof.
    FenceProves,
    ExpiredIsLost,
    ReleaseAgainIsLost,
    ReleaseFreesForItsOwn,
    DeferralCounts,
    NotStartedIsHandedBack,
    InterruptionsAreFree,
    ParkedIsDone,
    ParkedIsFree,
    BackoffIsSkipped,
    BackoffIsSkippedByThePermit,
    NobodyIsSuspect,
    MarkEndsWithRelease,
    MarkOutlivesDone,
    AnyHigherGenerationIsFresh,
    RedriveKeepsAttempts,
    RedriveWaitsForTheBackoff,
    RedriveUndoesDone,
    WindowIsTheClaims,
    WindowIsShort,
    WindowNeverEnds,
    /// A released record is kept for as long as it backs off, or its retention, whichever is longer.
    BackoffIsPartOfTheRetention,
    DeferralIsKeptForEver,
    CompleteAgainExtends,
    CompleteOfNothingLeavesNothing,
    CompleteOfNothingSaysYes,
    ReleaseOfNothingIsLost,
    FenceIsACounter,
    FenceIsTheClock,
    FenceOfTheRunIsTaken,
    DigestIsReplaced,
    DigestHas64Bits,
    DigestIsForgottenWhenDone,
    KeyHas120Bits,
    KeyEndsAtNul,
    GenerationIsSigned,
    LengthsAreU32Millis,
    ZeroIsForEver,
    UnknownVersionIsAbsent,
    RefusedClaimIsAChange,
    InspectShowsThePast,
    ForgetAlwaysSaysYes,
    DroppedCallsLeaveTheirAnswers,
    DebugShowsKeys,
    RestartLosesADay,
}

/// A plain store: a map, the machine, and a flaw.
#[derive(Clone)]
struct Plain {
    flaw: Flaw,
    shared: Arc<Mutex<Data>>,
    epoch: Instant,
}

#[derive(Default, Debug)]
struct Data {
    records: HashMap<DedupKey, Record>,
    unknown: HashSet<DedupKey>,
    counter: u64,
    answers: VecDeque<Option<Claim>>,
    day: Micros,
}

impl std::fmt::Debug for Plain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.flaw {
            Flaw::DebugShowsKeys => write!(f, "{:?}", self.shared.lock().unwrap()),
            _ => f.write_str("Plain"),
        }
    }
}

const START: Micros = 1_700_000_000_000_000;
const NOBODY: Token = Token::from_bits(0xbad);
const DAY: Micros = 24 * 3_600 * 1_000_000;

impl Plain {
    fn new(flaw: Flaw) -> Self {
        Self { flaw, shared: Arc::default(), epoch: Instant::now() }
    }

    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == flaw
    }

    fn now(&self) -> Micros {
        let day = self.shared.lock().unwrap().day;
        START + u64::try_from(self.epoch.elapsed().as_micros()).unwrap() - day
    }

    fn place(&self, key: &DedupKey) -> DedupKey {
        let mut bytes = *key.as_bytes();
        match self.flaw {
            Flaw::KeyHas120Bits => bytes[15] = 0,
            Flaw::KeyEndsAtNul => {
                let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(16);
                bytes[end..].fill(0);
            }
            _ => {}
        }
        DedupKey::from_bytes(bytes)
    }

    fn read(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        let data = self.shared.lock().unwrap();
        if data.unknown.contains(key) && !self.has(Flaw::UnknownVersionIsAbsent) {
            return Err(StoreError::new("a record of an unknown version: upgrade this process"));
        }
        let record = data.records.get(&self.place(key)).copied();
        Ok(record.map(|record| self.as_kept(record)))
    }

    fn as_kept(&self, record: Record) -> Record {
        match (self.flaw, record.state) {
            (Flaw::LeaseIsLifetime, State::Claimed { deadline }) => Record { kept_until: deadline, ..record },
            (Flaw::WindowNeverEnds, State::Done) => Record { kept_until: u64::MAX, ..record },
            (Flaw::DeferralIsKeptForEver, State::Released { not_before }) if not_before > 0 => {
                Record { kept_until: u64::MAX, ..record }
            }
            _ => record,
        }
    }

    fn write(&self, key: &DedupKey, record: Option<Record>) {
        let mut data = self.shared.lock().unwrap();
        match record {
            Some(record) => data.records.insert(self.place(key), record),
            None => data.records.remove(&self.place(key)),
        };
    }

    /// One step, atomic but for the flaw: the runtime has one thread.
    async fn step<A>(
        &self,
        key: &DedupKey,
        step: impl FnOnce(Machine, Option<Record>) -> (Option<Record>, A),
    ) -> Result<A, StoreError> {
        let old = self.read(key)?;
        if self.has(Flaw::GetThenSet) {
            yield_now().await;
        }
        let (new, answer) = step(Machine::at(self.now()), old);
        self.write(key, new);
        Ok(answer)
    }

    fn length(&self, length: Duration) -> Duration {
        match self.flaw {
            Flaw::LengthsAreU32Millis => {
                Duration::from_millis(u64::from(u32::try_from(length.as_millis() % (1 << 32)).unwrap()))
            }
            Flaw::ZeroIsForEver if length.is_zero() => Duration::MAX,
            Flaw::LeaseIsShort => length * 9 / 10,
            _ => length,
        }
    }

    /// The claim that a store with this flaw takes it for.
    fn ask(&self, ask: &Ask) -> Ask {
        let mut ask = Ask { lease: self.length(ask.lease), ..*ask };
        match self.flaw {
            Flaw::DigestHas64Bits => ask.digest = ask.digest.map(|digest| digest & u128::from(u64::MAX)),
            Flaw::NobodyIsSuspect => ask.alone = true,
            Flaw::GenerationIsSigned => ask.generation &= i32::MAX.cast_unsigned(),
            _ => {}
        }
        ask
    }

    /// The record that a store with this flaw takes it for, when it is claimed.
    fn found(&self, now: Micros, record: Option<Record>, ask: &Ask) -> Option<Record> {
        let mut record = record?;
        let next = record.generation.checked_add(1);
        match (self.flaw, record.state) {
            (Flaw::ClaimAgainCountsAgain, State::Claimed { .. }) if record.run.token == ask.token => {
                record.state = State::Released { not_before: 0 };
                record.run.token = NOBODY;
            }
            (Flaw::ReleaseFreesForItsOwn, State::Released { .. })
            | (Flaw::ClaimAgainIsBusy, State::Claimed { .. }) => record.run.token = NOBODY,
            (Flaw::ParkedIsFree, State::Parked) | (Flaw::BackoffIsSkipped, State::Released { .. }) => {
                record.state = State::Released { not_before: 0 };
            }
            (Flaw::BackoffIsSkippedByThePermit, State::Released { .. }) if ask.alone => {
                record.state = State::Released { not_before: 0 };
            }
            (Flaw::AnyHigherGenerationIsFresh, State::Released { .. } | State::Parked)
                if ask.generation > record.generation =>
            {
                record.generation = ask.generation - 1;
            }
            (Flaw::RedriveKeepsAttempts, State::Parked) if Some(ask.generation) == next => {
                record.state = State::Released { not_before: 0 };
                record.generation = ask.generation;
            }
            (Flaw::RedriveWaitsForTheBackoff, State::Released { not_before }) if now < not_before => {
                record.generation = ask.generation;
            }
            (Flaw::RedriveUndoesDone, State::Done) if Some(ask.generation) == next => return None,
            (Flaw::DigestIsReplaced, _) => record.digest = ask.digest.or(record.digest),
            _ => {}
        }
        Some(record)
    }

    fn claim_by(&self, machine: Machine, old: Option<Record>, ask: &Ask) -> (Option<Record>, Claim) {
        let now = self.now();
        let (record, claim) = machine.claim(self.found(now, old, ask), ask);
        let Claim::Acquired { attempt, before, digest, .. } = claim else {
            return self.refused(now, old, claim);
        };
        let mut record = record.unwrap();
        let again = old.is_some_and(|old| old.run.token == ask.token);
        match self.flaw {
            Flaw::FenceIsACounter => record.run.fence = self.count(old),
            Flaw::FenceIsTheClock if !again => record.run.fence = Fence(now),
            Flaw::ClaimAgainKeepsItsDeadline if again => record.state = old.unwrap().state,
            _ => {}
        }
        (Some(record), Claim::Acquired { fence: record.run.fence, attempt, before, digest })
    }

    fn refused(&self, now: Micros, old: Option<Record>, claim: Claim) -> (Option<Record>, Claim) {
        match (self.flaw, claim) {
            (Flaw::RefusedClaimIsAChange, _) => {
                (old.map(|old| Record { kept_until: old.kept_until.max(now + 4_000_000_000), ..old }), claim)
            }
            (Flaw::ParkedIsDone, Claim::Parked { digest }) => (old, Claim::Done { digest }),
            _ => (old, claim),
        }
    }

    /// The last fence and one: gone with the record.
    fn count(&self, old: Option<Record>) -> Fence {
        let mut data = self.shared.lock().unwrap();
        data.counter += 1;
        Fence(old.map_or(1, |old| old.run.fence.0 + 1))
    }

    /// The run that a store with this flaw takes the caller for.
    fn caller(&self, flaw: Flaw, run: Run, record: Option<Record>) -> Run {
        match record {
            Some(record) if self.has(flaw) => record.run,
            Some(record) if self.has(Flaw::FenceProves) && record.run.fence == run.fence => record.run,
            _ => run,
        }
    }

    fn is_expired(&self, record: Option<Record>) -> bool {
        matches!(record, Some(Record { state: State::Claimed { deadline }, .. }) if deadline <= self.now())
    }

    fn release_by(
        &self,
        machine: Machine,
        old: Option<Record>,
        run: Run,
        why: Release,
    ) -> (Option<Record>, Held) {
        let (record, held) = machine.release(old, self.caller(Flaw::AnyTokenReleases, run, old), why);
        let was_claimed = matches!(old, Some(Record { state: State::Claimed { .. }, .. }));
        let Some(mut kept) = record.filter(|_| held == Held::Yes) else {
            let of_nothing = held == Held::Gone && self.has(Flaw::ReleaseOfNothingIsLost);
            return (record, if of_nothing { Held::Lost } else { held });
        };
        match (self.flaw, why) {
            (Flaw::ReleaseAgainIsLost, _) if !was_claimed => return (old, Held::Lost),
            (Flaw::DeferralCounts, Release::Deferred { .. }) if was_claimed => kept.attempt += 1,
            (Flaw::NotStartedIsHandedBack, Release::NotStarted) => kept.before = Before::HandedBack,
            (Flaw::InterruptionsAreFree, Release::Interrupted) => kept.interruptions = 1,
            (Flaw::MarkEndsWithRelease, Release::Deferred { .. }) => kept.suspect = false,
            (
                Flaw::BackoffIsPartOfTheRetention,
                Release::Failed { not_before } | Release::Deferred { not_before },
            ) => {
                let longer = u64::try_from(kept.retain.max(not_before).as_micros()).unwrap_or(u64::MAX);
                kept.kept_until = self.now().saturating_add(longer);
            }
            _ => {}
        }
        (Some(kept), held)
    }

    fn complete_by(
        &self,
        machine: Machine,
        old: Option<Record>,
        run: Run,
        window: Duration,
    ) -> (Option<Record>, Held) {
        let window = match self.flaw {
            Flaw::WindowIsTheClaims => old.map_or(window, |old| old.retain),
            Flaw::WindowIsShort => window * 9 / 10,
            _ => self.length(window),
        };
        let run = self.caller(Flaw::AnyTokenCompletes, run, old);
        let reopened = old.filter(|old| self.has(Flaw::CompleteAgainExtends) && old.state == State::Done);
        let reopened = reopened.map(|old| Record { state: State::Claimed { deadline: 0 }, ..old });
        let (record, held) = machine.complete(reopened.or(old), run, window);
        match (self.flaw, held) {
            (Flaw::CompleteOfNothingLeavesNothing, Held::Gone) => (old, held),
            (Flaw::CompleteOfNothingSaysYes, Held::Gone) => (record, Held::Yes),
            (Flaw::MarkOutlivesDone, Held::Yes) => {
                (record.map(|done| Record { suspect: old.unwrap().suspect, ..done }), held)
            }
            (Flaw::DigestIsForgottenWhenDone, Held::Yes) => {
                (record.map(|done| Record { digest: None, ..done }), held)
            }
            (Flaw::FenceOfTheRunIsTaken, Held::Yes) => (record.map(|done| Record { run, ..done }), held),
            _ => (record, held),
        }
    }
}

#[async_trait]
impl DedupStore for Plain {
    async fn claim(&self, key: &DedupKey, ask: &Ask) -> Result<Claim, StoreError> {
        let ask = self.ask(ask);
        let claim = self.step(key, |machine, record| self.claim_by(machine, record, &ask)).await?;
        // The answer comes back over a connection.
        self.shared.lock().unwrap().answers.push_back(Some(claim));
        yield_now().await;
        let first = self.shared.lock().unwrap().answers.pop_front().flatten();
        Ok(if self.has(Flaw::DroppedCallsLeaveTheirAnswers) { first.unwrap_or(claim) } else { claim })
    }

    async fn renew(&self, key: &DedupKey, run: Run, lease: Duration) -> Result<Held, StoreError> {
        let lease = self.length(lease);
        self.step(key, |machine, record| {
            let run = self.caller(Flaw::AnyTokenRenews, run, record);
            if self.has(Flaw::ExpiredIsLost) && self.is_expired(record) {
                return (record, Held::Lost);
            }
            let (renewed, held) = machine.renew(record, run, lease);
            let keeps = self.has(Flaw::RenewalNeverShortens) && held == Held::Yes;
            match (renewed, record) {
                (Some(new), Some(old)) if keeps => (Some(later_of(old, new)), held),
                _ => (renewed, held),
            }
        })
        .await
    }

    async fn complete(&self, key: &DedupKey, run: Run, window: Duration) -> Result<Held, StoreError> {
        self.step(key, |machine, record| self.complete_by(machine, record, run, window)).await
    }

    async fn release(&self, key: &DedupKey, run: Run, why: Release) -> Result<Held, StoreError> {
        // Here zero does mean none.
        let backoff = |length: Duration| if length.is_zero() { length } else { self.length(length) };
        let why = match why {
            Release::Failed { not_before } => Release::Failed { not_before: backoff(not_before) },
            Release::Deferred { not_before } => Release::Deferred { not_before: backoff(not_before) },
            other => other,
        };
        self.step(key, |machine, record| self.release_by(machine, record, run, why)).await
    }

    async fn inspect(&self, key: &DedupKey) -> Result<Option<Record>, StoreError> {
        let (record, machine) = (self.read(key)?, Machine::at(self.now()));
        Ok(if self.has(Flaw::InspectShowsThePast) { record } else { machine.live(record) })
    }

    async fn forget(&self, key: &DedupKey) -> Result<bool, StoreError> {
        let there = Machine::at(self.now()).live(self.read(key)?).is_some();
        self.write(key, None);
        Ok(there || self.has(Flaw::ForgetAlwaysSaysYes))
    }

    fn features(&self) -> StoreFeatures {
        StoreFeatures::SHARED
    }
}

fn later_of(old: Record, new: Record) -> Record {
    match (old.state, new.state) {
        (State::Claimed { deadline: old_end }, State::Claimed { deadline }) => {
            Record { state: State::Claimed { deadline: deadline.max(old_end) }, ..new }
        }
        _ => new,
    }
}

struct Shop(Plain);

#[async_trait]
impl StoreFixture for Shop {
    async fn open(&self) -> Arc<dyn DedupStore> {
        let mut handle = self.0.clone();
        if handle.has(Flaw::Unshared) {
            handle.shared = Arc::default();
        }
        Arc::new(handle)
    }

    async fn lose(&self, key: &DedupKey) {
        self.0.shared.lock().unwrap().unknown.remove(key);
        self.0.write(key, None);
    }

    async fn lose_everything(&self) -> bool {
        self.0.shared.lock().unwrap().records.clear();
        true
    }

    async fn restart(&self) -> bool {
        if self.0.has(Flaw::RestartLosesADay) {
            let mut data = self.0.shared.lock().unwrap();
            data.day = DAY;
            data.records.clear();
        }
        true
    }

    async fn write_unknown_version(&self, key: &DedupKey) -> bool {
        self.0.shared.lock().unwrap().unknown.insert(*key)
    }

    fn pace(&self) -> Pace {
        Pace::default()
    }
}

/// Whether a store with this flaw keeps what the case promises.
fn keeps(flaw: Flaw, case: Case) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.unwrap();
    catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async { case(&Shop(Plain::new(flaw))).await });
    }))
    .is_ok()
}

type Case = for<'a> fn(&'a dyn StoreFixture) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

macro_rules! caught {
    ($($flaw:ident by $($case:ident)+;)+) => {
        [$((Flaw::$flaw, &[$((stringify!($case), (|fixture| Box::pin(contract::$case(fixture))) as Case)),+] as &[_])),+]
    };
}

#[test]
fn a_plain_store_keeps_the_contract() {
    assert!(keeps(Flaw::None, |fixture| Box::pin(store_contract(fixture))));
}

#[test]
fn each_flaw_is_caught_by_the_case_of_that_name() {
    let flaws = caught! {
        GetThenSet by of_a_thousand_claims_one_wins;
        Unshared by a_second_handle_sees_what_the_first_did;
        LeaseIsLifetime by an_expired_claim_is_held_until_it_is_taken a_vanished_attempt_counts
            an_expired_claim_is_suspect it_answers_as_the_machine_does;
        ClaimAgainIsBusy by a_claim_repeated_with_its_token_counts_once;
        ClaimAgainCountsAgain by a_claim_repeated_with_its_token_counts_once;
        ClaimAgainKeepsItsDeadline by a_claim_repeated_sets_the_deadline_anew;
        LeaseIsShort by a_lease_is_never_short_and_ends a_backoff_is_never_short_and_ends;
        RenewalNeverShortens by a_renewal_holds_from_its_own_instant;
        AnyTokenReleases by another_token_changes_nothing_that_is_claimed
            another_token_changes_nothing_that_is_expired another_token_changes_nothing_that_is_released;
        AnyTokenCompletes by another_token_changes_nothing_that_is_claimed
            another_token_changes_nothing_that_is_parked_or_done;
        AnyTokenRenews by another_token_changes_nothing_that_is_claimed;
        FenceProves by the_token_alone_proves_ownership;
        ExpiredIsLost by an_expired_claim_is_held_until_it_is_taken;
        ReleaseAgainIsLost by a_release_repeated_says_yes_and_changes_nothing;
        ReleaseFreesForItsOwn by a_run_that_released_does_not_claim_again;
        DeferralCounts by a_deferral_gives_its_attempt_back;
        NotStartedIsHandedBack by not_started_restores_the_attempt_and_what_was_before;
        InterruptionsAreFree by interruptions_are_free_three_times_in_a_row;
        ParkedIsDone by a_dead_letter_is_parked;
        ParkedIsFree by a_dead_letter_is_parked;
        BackoffIsSkipped by a_backoff_is_never_short_and_ends;
        BackoffIsSkippedByThePermit by a_copy_neither_skips_the_backoff_nor_burns_attempts;
        NobodyIsSuspect by an_expired_claim_is_suspect;
        MarkEndsWithRelease by the_mark_stays_through_every_release;
        MarkOutlivesDone by the_mark_ends_with_done_and_parked;
        AnyHigherGenerationIsFresh by a_generation_from_the_future_is_the_records_own;
        RedriveKeepsAttempts by the_next_generation_starts_afresh;
        RedriveWaitsForTheBackoff by the_next_generation_starts_afresh;
        RedriveUndoesDone by what_is_done_is_done_for_everybody a_redrive_disturbs_neither_a_holder_nor_what_is_done;
        WindowIsTheClaims by the_window_is_the_completes;
        WindowIsShort by a_window_is_never_short_and_ends what_a_lost_record_left_behind_ends_too;
        WindowNeverEnds by a_window_is_never_short_and_ends;
        BackoffIsPartOfTheRetention by
            attempts_and_the_suspect_mark_survive_a_deferral_longer_than_the_retention
            every_record_is_kept_from_its_last_change;
        DeferralIsKeptForEver by every_record_is_kept_from_its_last_change;
        CompleteAgainExtends by a_complete_repeated_says_yes;
        CompleteOfNothingLeavesNothing by complete_of_a_lost_record_inserts_done;
        CompleteOfNothingSaysYes by complete_of_a_lost_record_inserts_done;
        ReleaseOfNothingIsLost by nothing_is_held_where_nothing_is_on_record;
        FenceIsACounter by fences_only_grow a_lost_record_suppresses_nothing;
        FenceIsTheClock by fences_only_grow;
        FenceOfTheRunIsTaken by the_token_alone_proves_ownership;
        DigestIsReplaced by the_digest_first_seen_is_kept;
        DigestHas64Bits by the_digest_first_seen_is_kept every_bit_of_what_is_kept_comes_back;
        DigestIsForgottenWhenDone by the_digest_first_seen_is_kept;
        KeyHas120Bits by keys_that_differ_in_one_bit_are_kept_apart;
        KeyEndsAtNul by keys_of_any_bytes_are_keys;
        GenerationIsSigned by every_bit_of_what_is_kept_comes_back the_highest_generation_does_not_overflow;
        LengthsAreU32Millis by the_longest_times_are_taken;
        ZeroIsForEver by a_time_of_zero_ends;
        UnknownVersionIsAbsent by a_record_of_an_unknown_version_is_an_error;
        RefusedClaimIsAChange by a_refused_claim_changes_nothing;
        InspectShowsThePast by every_record_is_kept_from_its_last_change;
        ForgetAlwaysSaysYes by forget_says_whether_there_was_anything;
        DroppedCallsLeaveTheirAnswers by answers_are_not_mixed_up_by_dropped_calls;
        DebugShowsKeys by debug_shows_no_key;
        RestartLosesADay by a_restart_keeps_what_the_store_promises;
    };
    for (flaw, cases) in flaws {
        for (name, case) in cases {
            assert!(keeps(Flaw::None, *case), "{name} holds of a store without a flaw");
            assert!(!keeps(flaw, *case), "{flaw:?} is not noticed by {name}");
        }
    }
}
