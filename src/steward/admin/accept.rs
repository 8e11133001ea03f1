//! What a scraper understands: the `Accept` field of `/metrics`.

use hyper::header::{self, HeaderMap};

/// Whether OpenMetrics is wanted at least as much as the older text format.
///
/// Who asks for neither (`curl`, `*/*`) gets the older one, which every tool
/// reads, `promtool check metrics` among them.
pub fn prefers_openmetrics(headers: &HeaderMap) -> bool {
    let (mut open, mut plain) = (0, 0);
    let fields = headers.get_all(header::ACCEPT).iter().filter_map(|field| field.to_str().ok());
    for range in fields.flat_map(|field| field.split(',')) {
        let mut words = range.split(';').map(str::trim);
        let media_type = words.next().unwrap_or_default().to_ascii_lowercase();
        let weight = words.find_map(|word| word.strip_prefix("q=")).map_or(1_000, weight);
        match media_type.as_str() {
            "application/openmetrics-text" => open = open.max(weight),
            "text/plain" | "text/*" => plain = plain.max(weight),
            _ => {}
        }
    }
    open > 0 && open >= plain
}

/// A quality value in thousandths; rubbish wants nothing.
fn weight(text: &str) -> u32 {
    let value = text.parse::<f64>().unwrap_or(0.0);
    (value.clamp(0.0, 1.0) * 1_000.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    #[test]
    fn the_better_liked_format_is_given() {
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;\
            version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let cases = [
            (prometheus, true),
            ("application/openmetrics-text", true),
            ("text/plain;version=0.0.4, application/openmetrics-text;q=0.2", false),
            ("application/openmetrics-text;q=0", false),
            ("*/*", false),
            ("", false),
            (";;q=,,application/openmetrics-text;q=rubbish", false),
        ];
        for (accept, expected) in cases {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            assert_eq!(prefers_openmetrics(&headers), expected, "{accept}");
        }
        assert!(!prefers_openmetrics(&HeaderMap::new()));
    }
}
