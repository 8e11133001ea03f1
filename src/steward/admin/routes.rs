//! From a request to its answer.
//!
//! `GET` and `HEAD` only. Nothing here changes anything, so the one thing to
//! guard is what can be read: no answer may be read by another web site
//! (no CORS), and none reaches a page whose name was pointed at this address
//! (the check of `Host`).

use std::net::{IpAddr, SocketAddr};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use super::documents::Documents;
use super::metrics::Format;
use super::{accept, page};

/// What is sent back.
pub type Answer = Response<Full<Bytes>>;

const TEXT: &str = "text/plain; charset=utf-8";

/// The paths, for whoever asks for another one.
const PATHS: &str = "there are / (status page), /metrics, /status.json and /healthz\n";

/// Answers a request that came to the admin address.
pub async fn answer(request: &Request<Incoming>, at: SocketAddr, documents: &Documents) -> Answer {
    let mut answer = match refuse(request.method(), request.headers(), at) {
        Some(refusal) => refusal,
        None => route(request, documents).await,
    };
    guard(answer.headers_mut());
    answer
}

async fn route(request: &Request<Incoming>, documents: &Documents) -> Answer {
    match request.uri().path() {
        "/" => {
            let (page, policy) = page::page();
            let mut answer = with(StatusCode::OK, "text/html; charset=utf-8", page.into());
            let policy = HeaderValue::from_str(&policy).expect("a policy is plain text");
            answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
            answer
        }
        "/metrics" => {
            let format = match accept::prefers_openmetrics(request.headers()) {
                true => Format::OpenMetrics,
                false => Format::Prometheus,
            };
            match documents.snapshot().await {
                Some(snapshot) => with(StatusCode::OK, format.content_type(), snapshot.metrics(format)),
                None => unknown(),
            }
        }
        "/status.json" => match documents.snapshot().await {
            Some(snapshot) => with(StatusCode::OK, "application/json", snapshot.json()),
            None => unknown(),
        },
        "/healthz" => match documents.unhealthy() {
            None => with(StatusCode::OK, TEXT, "ok\n".into()),
            Some(reason) => with(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{reason}\n").into()),
        },
        _ => with(StatusCode::NOT_FOUND, TEXT, PATHS.into()),
    }
}

fn unknown() -> Answer {
    with(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "the daemon's state could not be read\n".into())
}

/// What is wrong with a request, whatever its path.
fn refuse(method: &Method, headers: &HeaderMap, at: SocketAddr) -> Option<Answer> {
    if method != Method::GET && method != Method::HEAD {
        let mut answer = with(StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET and HEAD only\n".into());
        answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Some(answer);
    }
    let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or("?"));
    if at.ip().is_loopback() && !host.is_none_or(is_local) {
        let text = "this address is for this host: ask for localhost or an IP address (a proxy in front has to set Host)\n";
        return Some(with(StatusCode::MISDIRECTED_REQUEST, TEXT, text.into()));
    }
    None
}

/// Whether a `Host` can be nobody's web site: a browser that was led here by a
/// name of somebody else's sends that name. Only asked on loopback; elsewhere
/// the operator gave the address to the network, and names for it are theirs.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((literal, _)) => literal,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost") || name.parse::<IpAddr>().is_ok()
}

fn with(status: StatusCode, content_type: &'static str, body: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(body));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// What every answer says to browsers.
fn guard(headers: &mut HeaderMap) {
    let plain = [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    for (name, value) in plain {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // Nothing but the page runs or loads anything.
    let none = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(none);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_somebody_else_is_not_local() {
        let local = [
            "localhost",
            "localhost:9180",
            "127.0.0.1:9180",
            "[::1]:9180",
            "10.0.0.1",
            "LOCALHOST.",
            "a.localhost:1",
        ];
        for host in local {
            assert!(is_local(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9180",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "",
            "?",
            "[x]",
        ] {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn a_name_is_refused_on_loopback_alone() {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("balancer.example:9180"));
        let at = |address: &str| {
            refuse(&Method::GET, &headers, address.parse().unwrap()).map(|answer| answer.status())
        };
        assert_eq!(at("127.0.0.1:9180"), Some(StatusCode::MISDIRECTED_REQUEST));
        assert_eq!(at("10.0.0.1:9180"), None);
        assert_eq!(at("0.0.0.0:9180"), None);
    }
}
