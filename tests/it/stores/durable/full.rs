//! A full disk (F21): an outage that ends by itself, and suppresses nothing.

use std::io::Write;

use super::*;

/// Runs a test in a file system of its own. The mount is seen by that process only, and ends with it.
fn on_a_small_disk(test: &str, size: &str) {
    let temp = Temp::new();
    fs::create_dir(&temp.0).unwrap();
    let inside = child(test, &temp.0);
    let mount = format!("mount -t tmpfs -o size={size} tmpfs \"$0\" && exec \"$@\"");
    let mut command = Command::new("unshare");
    // As root in a namespace of its own also for whoever is not root.
    command.args(["--map-root-user", "--mount", "sh", "-c", &mount]).arg(&temp.0);
    command.arg(inside.get_program()).args(inside.get_args()).env(FOLDER, &temp.0);
    let output = command.output().expect("this test needs unshare, of util-linux");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "it needs root, or user namespaces (sysctl kernel.unprivileged_userns_clone):\n{said}"
    );
}

/// Takes what space there is.
fn fill(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    while file.write_all(&[7; 4_096]).is_ok() {}
    while file.write_all(&[7]).is_ok() {}
}

async fn until_it_works(store: &DurableStore, number: u64) {
    let works = async {
        while handle(store, number).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), works).await.expect("it goes on when there is space");
}

#[test]
fn a_full_disk_is_an_outage_that_ends_by_itself() {
    on_a_small_disk("full::full_and_free_again", "24m");
}

#[tokio::test]
#[ignore = "runs as the child of another test"]
async fn full_and_free_again() {
    let folder = folder_of_child();
    let (store_at, filler) = (folder.join("store"), folder.join("filler"));
    for durability in [Durability::Process, Durability::Power] {
        let store = DurableStore::builder(&store_at).durability(durability).open().await.unwrap();
        let first = if durability == Durability::Process { 0 } else { 1_000_000 };
        for number in first..first + 100 {
            handle(&store, number).await.unwrap();
        }
        fill(&filler);
        let mut confirmed = first + 100;
        let error = loop {
            match handle(&store, confirmed).await {
                Ok(()) => confirmed += 1,
                Err(error) => break error.to_string(),
            }
            assert!(confirmed < first + 10_000, "the disk is not full");
        };
        assert!(error.contains("disk is full"), "{error}");
        for number in confirmed + 1..confirmed + 100 {
            store.claim(&key(number), &ask()).await.expect_err("the disk is still full");
        }
        fs::remove_file(&filler).unwrap();
        until_it_works(&store, first + 500_000).await;
        all_as_confirmed(&store, first, confirmed).await;
        store.close().await.unwrap();
        let store = DurableStore::open(&store_at).await.unwrap();
        all_as_confirmed(&store, first, confirmed).await;
        store.close().await.unwrap();
    }
}

/// All that was confirmed is a duplicate, and nothing else is.
async fn all_as_confirmed(store: &DurableStore, first: u64, confirmed: u64) {
    for number in first..confirmed {
        assert!(is_done(store, number).await, "{number} of {confirmed}");
    }
    for number in confirmed..confirmed + 100 {
        assert!(!is_done(store, number).await, "{number} was never confirmed");
    }
}

/// Not the journal runs out of space, but the workers that write tables in the background.
#[test]
fn a_disk_that_fills_up_in_the_background_is_an_outage_too() {
    on_a_small_disk("full::filled_up_by_work", "56m");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn filled_up_by_work() {
    let folder = folder_of_child();
    let (store_at, filler) = (folder.join("store"), folder.join("filler"));
    fs::write(&filler, vec![7; 24 << 20]).unwrap();
    let store = DurableStore::open(&store_at).await.unwrap();
    let tasks = (0..64_u64).map(|task| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut number = task << 32;
            while handle(&store, number).await.is_ok() {
                number += 1;
            }
            (task << 32, number)
        })
    });
    let tasks: Vec<_> = tasks.collect();
    let mut confirmed = Vec::new();
    for task in tasks {
        confirmed.push(task.await.unwrap());
    }
    fs::remove_file(&filler).unwrap();
    until_it_works(&store, u64::MAX).await;
    for (first, end) in confirmed {
        for number in (first..end).step_by(97) {
            assert!(is_done(&store, number).await, "{number} of {first}..{end}");
        }
    }
    println!("{}", fs::read_dir(store_at.join("data")).unwrap().count());
}
