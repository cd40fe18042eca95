//! Where the claims are in the database.

use crate::dedup::StoreError;

/// Names are put into statements as they are, so they may hold nothing but these characters; and the
/// longest one made of them (`…_sweep_after`) must stay within Postgres' 63 bytes.
const LONGEST: usize = 48;

/// The schema and the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) schema: String,
    pub(crate) table: String,
}

impl Default for Names {
    fn default() -> Self {
        Self { schema: "guestlist".to_owned(), table: "claims".to_owned() }
    }
}

impl Names {
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        [("schema", &self.schema), ("table", &self.table)].into_iter().try_for_each(|(what, name)| {
            if is_plain(name) {
                return Ok(());
            }
            Err(StoreError::new(format!(
                "the {what} of the Postgres store must be 1 to {LONGEST} lower-case letters, digits and underscores, not beginning with a digit"
            )))
        })
    }

    /// A text in which `{schema}` and `{table}` stand for the names.
    pub(crate) fn fill(&self, text: &str) -> String {
        text.replace("{schema}", &self.schema).replace("{table}", &self.table)
    }
}

fn is_plain(name: &str) -> bool {
    let starts = name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_');
    starts
        && name.len() <= LONGEST
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_could_end_its_quotes_is_refused() {
        let names = |schema: &str, table: &str| Names { schema: schema.into(), table: table.into() }.check();
        names("guestlist", "claims").unwrap();
        names("_g2", &"t".repeat(LONGEST)).unwrap();
        for bad in ["", "2g", "G", "a b", "a\"b", "a'b", "a.b", "é", &"t".repeat(LONGEST + 1)] {
            assert!(names(bad, "claims").is_err(), "{bad}");
            assert!(names("guestlist", bad).is_err(), "{bad}");
        }
    }
}
