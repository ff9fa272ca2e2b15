//! The live page: static files, compiled into the binary so that it works without internet and
//! without an installation folder.
//!
//! There is no build step and no framework: plain ES modules and one charting library (uPlot
//! 1.6.32 from npm, MIT, unchanged in `vendor/` beside its licence). The page knows the
//! coordinator only by `/api/snapshot`, `/api/steps`, `/api/events` and `/api/live`; whoever
//! serves it needs [`asset`] and [`SECURITY_HEADERS`].

/// One static file of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asset {
    /// Where it is served, with the leading slash.
    pub path: &'static str,
    /// The value of its `Content-Type` header.
    pub content_type: &'static str,
    /// Its bytes.
    pub body: &'static [u8],
}

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

macro_rules! assets {
    ($($path:literal $type:ident $file:literal;)*) => {
        &[$(Asset { path: $path, content_type: $type, body: include_bytes!($file) }),*]
    };
}

/// Every file of the page.
pub const ASSETS: &[Asset] = assets![
    "/" HTML "index.html";
    "/app.js" SCRIPT "app.js";
    "/feed.js" SCRIPT "feed.js";
    "/history.js" SCRIPT "history.js";
    "/charts.js" SCRIPT "charts.js";
    "/view.js" SCRIPT "view.js";
    "/format.js" SCRIPT "format.js";
    "/style.css" STYLE "style.css";
    "/vendor/uplot.js" SCRIPT "vendor/uplot-1.6.32.min.js";
    "/vendor/uplot.css" STYLE "vendor/uplot-1.6.32.min.css";
    "/vendor/uplot.LICENSE" TEXT "vendor/uplot-1.6.32.LICENSE";
];

/// Headers for every answer. The policy lets the page load its own files and talk to its own
/// origin, nothing else: text from a worker (its name, say) that got into the markup by mistake
/// could still not run. `no-cache` because another build may serve the same address next.
pub const SECURITY_HEADERS: &[(&str, &str)] = &[
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cache-control", "no-cache"),
];

/// The file served at `path`, where there is one.
#[must_use]
pub fn asset(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(asset: &Asset) -> &'static str {
        std::str::from_utf8(asset.body).expect("the page's files are UTF-8")
    }

    fn ours() -> impl Iterator<Item = &'static Asset> {
        ASSETS.iter().filter(|a| !a.path.starts_with("/vendor/"))
    }

    /// What stands between `open` and the next `close`, for every occurrence.
    fn between<'a>(text: &'a str, open: &str, close: char) -> Vec<&'a str> {
        text.split(open).skip(1).filter_map(|rest| rest.split(close).next()).collect()
    }

    #[test]
    fn whatever_the_page_refers_to_is_served() {
        let index = text(asset("/").expect("there is an index"));
        let mut wanted = between(index, "src=\"", '"');
        wanted.extend(between(index, "href=\"", '"').into_iter().filter(|h| !h.starts_with("data:")));
        assert!(wanted.len() >= 4, "{wanted:?}");
        for script in ours().filter(|a| a.content_type == SCRIPT) {
            let imports = between(text(script), " from \"", '"');
            wanted.extend(imports.into_iter().map(|i| i.strip_prefix('.').unwrap_or(i)));
        }
        for path in wanted {
            assert!(asset(path).is_some(), "the page refers to {path}, which is not served");
        }
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_builds_no_markup_from_text() {
        for a in ours() {
            for forbidden in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!text(a).contains(forbidden), "{} uses {forbidden}", a.path);
            }
            let addresses = between(text(a), "://", '"');
            let outside: Vec<_> = addresses.iter().filter(|a| !a.starts_with("www.w3.org/")).collect();
            assert!(outside.is_empty(), "{} names {outside:?}", a.path);
            assert!(!text(a).contains(" style=\""), "{}: the policy refuses style attributes", a.path);
        }
    }
}
