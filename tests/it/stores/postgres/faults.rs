//! What a server and its other users do to a store: killed sessions, read-only servers, locks, isolation.

use tokio::time::{Instant, sleep, timeout};

use super::*;

/// A URL whose sessions have this setting.
fn with_option(url: &str, setting: &str, value: &str) -> String {
    let mut url = url::Url::parse(url).unwrap();
    url.query_pairs_mut().append_pair(&format!("options[{setting}]"), value);
    url.into()
}

/// A URL whose sessions are known by this name.
fn named(url: &str, name: &str) -> String {
    let mut url = url::Url::parse(url).unwrap();
    url.query_pairs_mut().append_pair("application_name", name);
    url.into()
}

impl Place {
    async fn kill_sessions(&self) -> i64 {
        let kill =
            "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = '{s}'";
        self.number(kill).await
    }

    /// A store whose sessions can be found and killed.
    async fn store_to_kill(&self) -> PostgresStore {
        let url = named(&self.url, &self.schema);
        PostgresStore::builder(&url).unwrap().schema(&*self.schema).connect().await.unwrap()
    }
}

#[tokio::test]
async fn sessions_killed_while_idle_are_made_anew_without_an_error() {
    let place = Place::migrated().await;
    let store = place.store_to_kill().await;
    for number in 0..5 {
        let keys = number * 100..number * 100 + 40;
        join_all(keys.map(|number| {
            let store = &store;
            async move { acquired(store, &key(number), &ask()).await }
        }))
        .await;
        assert!(place.kill_sessions().await > 0);
    }
    place.drop().await;
}

/// An error says nothing about the effect; the same call again says what is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_session_was_killed_is_resolved_by_asking_again() {
    let place = Place::migrated().await;
    let store = place.store_to_kill().await;
    let calls = (0..600).map(|number| {
        let store = store.clone();
        tokio::spawn(async move {
            let ask = ask();
            let give_up_at = Instant::now() + 60 * SECOND;
            let run = loop {
                match store.claim(&key(number), &ask).await {
                    Ok(Claim::Acquired { fence, attempt: 1, .. }) => break Run { token: ask.token, fence },
                    Ok(other) => panic!("{other:?}"),
                    Err(error) => assert!(Instant::now() < give_up_at, "{error:?}"),
                }
                sleep(Duration::from_millis(5)).await;
            };
            while !store.complete(&key(number), run, HOUR).await.is_ok_and(|held| held == Held::Yes) {
                assert!(Instant::now() < give_up_at);
                sleep(Duration::from_millis(5)).await;
            }
        })
    });
    let calls: Vec<_> = calls.collect();
    while !calls.iter().all(tokio::task::JoinHandle::is_finished) {
        place.kill_sessions().await;
        sleep(Duration::from_millis(3)).await;
    }
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!(place.number("select count(*) from {s}.claims where state = 3").await, 600);
    place.drop().await;
}

/// As a server that became a standby: the next connection may lead to the new primary.
#[tokio::test]
async fn a_read_only_server_is_an_error_until_it_is_writable_again() {
    let place = Place::migrated().await;
    let role = &place.schema;
    place
        .sql(&format!(
            "create role {role} superuser login; alter role {role} set default_transaction_read_only = on"
        ))
        .await;
    let mut url = url::Url::parse(&place.url).unwrap();
    url.set_username(role).unwrap();
    let store = PostgresStore::builder(url.as_str()).unwrap().schema(&**role).connect().await.unwrap();
    let error = store.claim(&key(1), &ask()).await.unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
    place.sql(&format!("alter role {role} reset default_transaction_read_only")).await;
    acquired(&store, &key(1), &ask()).await;
    drop(store);
    place.sql(&format!("drop schema {role} cascade; drop role {role}")).await;
}

#[tokio::test]
async fn a_role_without_rights_is_told_what_it_lacks() {
    let place = Place::migrated().await;
    let role = &place.schema;
    place.sql(&format!("create role {role} login")).await;
    let mut url = url::Url::parse(&place.url).unwrap();
    url.set_username(role).unwrap();
    let builder = PostgresStore::builder(url.as_str()).unwrap().schema(&**role);
    assert!(builder.clone().connect().await.is_err());
    let grants = "grant usage on schema {s} to {s};
        grant select, insert, update, delete on {s}.claims to {s}";
    place.sql(grants).await;
    let store = builder.connect().await.unwrap();
    let error = store.claim(&key(1), &ask()).await.unwrap_err();
    assert!(error.to_string().contains("USAGE"), "{error}");
    place.sql("grant usage on sequence {s}.claims_fence to {s}").await;
    let run = acquired(&store, &key(1), &ask()).await;
    assert_eq!(store.complete(&key(1), run, HOUR).await.unwrap(), Held::Yes);
    assert_eq!(store.sweep().await.unwrap(), 0);
    drop(store);
    place.sql(&format!("drop schema {role} cascade; drop owned by {role}; drop role {role}")).await;
}

/// A session that does not move must not hold up the claims of other keys, nor take a connection.
#[tokio::test]
async fn a_locked_record_holds_up_nobody_else() {
    let place = Place::migrated().await;
    let store = place.builder().connections(1).connect().await.unwrap();
    let run = acquired(&store, &key(1), &ask()).await;
    let mut other = place.pool.begin().await.unwrap();
    let lock = format!("select 1 from {}.claims for update", place.schema);
    sqlx::query(AssertSqlSafe(lock)).execute(&mut *other).await.unwrap();

    let renewal = tokio::spawn({
        let store = store.clone();
        async move { store.renew(&key(1), run, 30 * SECOND).await }
    });
    for number in 2..50 {
        timeout(10 * SECOND, acquired(&store, &key(number), &ask())).await.expect("not held up");
    }
    let claim = store.claim(&key(1), &ask()).await.unwrap();
    assert!(matches!(claim, Claim::InProgress { .. }), "a look needs no lock: {claim:?}");
    assert!(!renewal.is_finished());
    other.commit().await.unwrap();
    assert_eq!(timeout(10 * SECOND, renewal).await.unwrap().unwrap().unwrap(), Held::Yes);

    // Its holder vanished, and another transaction has it: perhaps the holder's own commit.
    place.sql("update {s}.claims set until = 1").await;
    let mut other = place.pool.begin().await.unwrap();
    let lock = format!("select 1 from {}.claims for update", place.schema);
    sqlx::query(AssertSqlSafe(lock)).execute(&mut *other).await.unwrap();
    let alone = || Ask { alone: true, ..ask() };
    let claim = store.claim(&key(1), &alone()).await.unwrap();
    assert!(matches!(claim, Claim::InProgress { .. }), "{claim:?}");
    other.rollback().await.unwrap();
    let claim = store.claim(&key(1), &alone()).await.unwrap();
    assert!(matches!(claim, Claim::Acquired { attempt: 2, .. }), "{claim:?}");
    place.drop().await;
}

/// A database may make stricter transactions the default.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_claim_wins_at_any_isolation() {
    let place = Place::migrated().await;
    for (number, isolation) in ["read committed", "repeatable read", "serializable"].into_iter().enumerate() {
        let number = u128::try_from(number).unwrap();
        let url = with_option(&place.url, "default_transaction_isolation", isolation);
        let builder = PostgresStore::builder(&url).unwrap().schema(&*place.schema);
        let processes = [builder.clone().connect().await.unwrap(), builder.connect().await.unwrap()];
        let claims = (0..200).map(|i| {
            let store = processes[i % 2].clone();
            tokio::spawn(async move {
                let ask = ask();
                let give_up_at = Instant::now() + 60 * SECOND;
                loop {
                    match store.claim(&key(number), &ask).await {
                        Ok(claim) => return claim,
                        Err(error) => assert!(Instant::now() < give_up_at, "{error:?}"),
                    }
                }
            })
        });
        let answers = join_all(claims).await;
        let won = answers.iter().filter(|answer| matches!(answer, Ok(Claim::Acquired { attempt: 1, .. })));
        assert_eq!(won.count(), 1, "{isolation}");
    }
    place.drop().await;
}

#[tokio::test]
async fn a_caller_who_gives_up_disturbs_nobody() {
    let place = Place::migrated().await;
    let store = place.builder().connections(1).connect().await.unwrap();
    for round in 0..50 {
        let claims = (0..20_u128).map(|number| {
            let store = &store;
            async move {
                let (key, ask) = (key(round * 100 + number), ask());
                let claim = store.claim(&key, &ask);
                if number % 3 == 0 {
                    let _ = timeout(Duration::from_micros(u64::try_from(number).unwrap() * 50), claim).await;
                    return;
                }
                let claim = claim.await.unwrap();
                assert!(matches!(claim, Claim::Acquired { attempt: 1, .. }), "{claim:?}");
            }
        });
        join_all(claims).await;
    }
    place.drop().await;
}

/// Calls that arrive while all connections are busy share a commit; one that finds one free does not wait.
#[tokio::test]
async fn calls_in_flight_share_commits() {
    let place = Place::migrated().await;
    let store = place.builder().connections(1).connect().await.unwrap();
    acquired(&store, &key(1_000), &ask()).await;
    join_all((0..100).map(|number| {
        let store = &store;
        async move { acquired(store, &key(number), &ask()).await }
    }))
    .await;
    let shared = place.number("select count(distinct xmin::text) from {s}.claims").await;
    assert!(shared <= 4, "{shared} transactions for 101 claims");
    place.drop().await;
}
