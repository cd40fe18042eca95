use super::target::{Address, Extras};

fn shown(url: &str) -> String {
    Address::parse(url).unwrap().to_string()
}

fn refused(url: &str) -> String {
    Address::parse(url).err().unwrap_or_else(|| panic!("{url} is good")).to_string()
}

#[test]
fn urls_of_one_server() {
    assert_eq!(shown("redis://localhost"), "redis://localhost:6379/0");
    assert_eq!(shown("redis://localhost/"), "redis://localhost:6379/0");
    assert_eq!(shown("valkey://cache:7000/12"), "redis://cache:7000/12");
    assert_eq!(shown("rediss://user:p%40ss@[::1]:7000/2"), "rediss://[::1]:7000/2");
    assert_eq!(shown("valkeys://[::1]"), "rediss://[::1]:6379/0");
}

#[test]
fn urls_of_sentinels_and_clusters() {
    assert_eq!(shown("redis+sentinel://a,b:1,[::1]/shop"), "redis+sentinel://a:26379,b:1,[::1]:26379/shop/0");
    assert_eq!(shown("rediss+sentinel://:secret@a/shop/3"), "rediss+sentinel://a:26379/shop/3");
    assert_eq!(shown("valkey+cluster://user:secret@a,b:1"), "redis+cluster://a:6379,b:1/0");
    assert_eq!(shown("valkeys+cluster://a/0"), "rediss+cluster://a:6379/0");
}

#[test]
fn the_prefix_is_in_the_query() {
    let prefix = |url| Address::parse(url).unwrap().prefix;
    assert_eq!(prefix("redis://a"), None);
    assert_eq!(prefix("redis://a/3?prefix=shop%3A"), Some("shop:".to_owned()));
    assert_eq!(prefix("redis+cluster://a,b?prefix={shop}:"), Some("{shop}:".to_owned()));
    assert_eq!(prefix("redis://a?prefix="), Some(String::new()));
}

#[test]
fn bad_urls_are_refused_without_repeating_them() {
    let cases = [
        ("localhost", "it has no scheme"),
        ("http://hush@a", "its scheme is none of"),
        ("redis+udp://hush@a", "only sentinel and cluster are known"),
        ("redis://hush@a,b", "several hosts"),
        ("redis://hush@a/shop", "it is not like"),
        ("redis://hush@a:port", "it is not like"),
        ("redis://hush@", "it is not like"),
        ("redis://hush#more@a", "%23"),
        ("redis://hush@0.0.0.0", "it is not like"),
        ("redis://hush@a?perfix=x", "only prefix"),
        ("redis+sentinel://hush@a", "the service's name"),
        ("redis+sentinel://hush@a,,b/shop", "it is not like"),
        ("redis+cluster://hush@a/2", "no databases but 0"),
    ];
    for (url, why) in cases {
        let text = refused(url);
        assert!(text.contains(why), "{url}: {text}");
        assert!(!text.contains("hush"), "{url}: {text}");
    }
}

#[test]
fn what_is_shown_has_no_login() {
    let url = "redis+sentinel://user:hush@a:1,b:2/shop";
    let builder = super::RedisStore::builder(url).sentinel_login("user", "hush");
    let target = Address::parse(url).unwrap().target(&Extras::default()).unwrap();
    for shown in [format!("{builder:?}"), target.to_string()] {
        assert!(!shown.contains("hush") && !shown.contains("user"), "{shown}");
    }
}

#[test]
fn settings_that_cannot_be_used_are_refused() {
    let extras = Extras { root_certificates: Some(b"not PEM".to_vec()), ..Extras::default() };
    for url in ["redis://a", "redis+sentinel://a/shop", "redis+cluster://a"] {
        // Without TLS there is nothing that certificates could be for.
        let target = Address::parse(url).unwrap().target(&extras);
        assert!(target.err().unwrap().to_string().contains("without TLS"), "{url}");
    }
}
