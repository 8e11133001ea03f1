//! The status page: one document with its style and its script, which fetches
//! `/status.json` and nothing else.

use std::hash::{BuildHasher, Hasher, RandomState};

const FRAME: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/style.css");
/// Four files of one script: words, parts of the page, things, the clockwork.
const SCRIPT: [&str; 4] = [
    include_str!("page/words.js"),
    include_str!("page/parts.js"),
    include_str!("page/views.js"),
    include_str!("page/live.js"),
];

/// The page, and the policy that lets its style and script run and nothing
/// else: both are named by a word that is another one each time.
pub fn page() -> (String, String) {
    // Seeded by the kernel; nobody who could guess it gets bytes into the page.
    let word = || RandomState::new().build_hasher().finish();
    let nonce = format!("{:016x}{:016x}", word(), word());
    let page = FRAME
        .replace("{{nonce}}", &nonce)
        .replace("{{style}}", STYLE)
        .replace("{{script}}", &SCRIPT.concat());
    let policy = format!(
        "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    (page, policy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_names_no_other_place() {
        let (page, policy) = page();
        assert!(!page.contains("{{") && page.contains("</html>"));
        let nonce = policy.split("'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).unwrap();
        assert_eq!(page.matches(nonce).count(), 2);
        // The one address is a name: that of SVG.
        let addresses = page.replace("http://www.w3.org/2000/svg", "");
        for outside in [
            "http:",
            "https:",
            "url(",
            "@import",
            "src=",
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "eval(",
        ] {
            assert!(!addresses.contains(outside), "{outside}");
        }
        assert_ne!(super::page().1, policy);
    }
}
