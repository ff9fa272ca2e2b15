//! What browsers, scripts and Prometheus get. Read-only: nothing here changes a run.
//!
//! | path | answer |
//! |---|---|
//! | `/` and the page's files | the live page |
//! | `/api/snapshot` | [`Snapshot`](caravan_types::status::Snapshot) |
//! | `/api/steps?since=N` | array of [`StepMetrics`](caravan_types::status::StepMetrics), ascending, with `step > N` (all without `since`); a long curve is thinned |
//! | `/api/events?since=N` | array of [`LoggedEvent`](caravan_types::status::LoggedEvent), ascending, with `number >= N` |
//! | `/api/live` | server-sent events `snapshot`, `step` and `event`, each with the JSON above; begins with a snapshot |
//! | `/metrics` | OpenMetrics text |
//! | `/healthz` | 200 while the run goes on, 503 after it |
//!
//! A step that was rolled back comes again over `/api/live`. A viewer that does not keep up is
//! hung up on, and gets a fresh start when it comes again, as browsers do on their own.

use crate::handle::Handle;
use crate::journal::Update;
use crate::metrics;
use crate::page;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use caravan_types::Step;
use serde::Deserialize;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

/// Updates that may wait for one viewer besides the feed's own room.
const VIEWER: usize = 16;

/// A viewer that takes nothing for so long is hung up on.
const VIEWER_PATIENCE: Duration = Duration::from_secs(10);

/// So often something is sent to a viewer even when nothing happens: a viewer that is gone is
/// found out, and proxies keep the connection.
const VIEWER_KEEPALIVE: Duration = Duration::from_secs(5);

/// All routes but gRPC's.
pub(crate) fn routes(handle: Handle) -> Router {
    let mut router = Router::new()
        .route("/api/snapshot", get(snapshot))
        .route("/api/steps", get(steps))
        .route("/api/events", get(events))
        .route("/api/live", get(live))
        .route("/metrics", get(scrape))
        .route("/healthz", get(health));
    for asset in page::ASSETS {
        let file = || async { ([(header::CONTENT_TYPE, asset.content_type)], asset.body) };
        router = router.route(asset.path, get(file));
    }
    router.with_state(handle).layer(from_fn(secure))
}

/// Adds the page's security headers to every answer.
async fn secure(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in page::SECURITY_HEADERS {
        let (name, value) = (HeaderName::from_static(name), HeaderValue::from_static(value));
        response.headers_mut().insert(name, value);
    }
    response
}

#[derive(Deserialize)]
struct Since {
    #[serde(default)]
    since: u64,
}

async fn snapshot(State(handle): State<Handle>) -> Response {
    Json(&*handle.snapshot()).into_response()
}

async fn steps(State(handle): State<Handle>, Query(Since { since }): Query<Since>) -> Response {
    Json(handle.steps(Step(since)).await).into_response()
}

async fn events(State(handle): State<Handle>, Query(Since { since }): Query<Since>) -> Response {
    Json(handle.events(since).await).into_response()
}

async fn scrape(State(handle): State<Handle>) -> Response {
    match handle.journal.scrape().await {
        Some(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn health(State(handle): State<Handle>) -> (StatusCode, &'static str) {
    if handle.alive() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the run is over\n")
    }
}

async fn live(State(handle): State<Handle>) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let (viewer, events) = mpsc::channel(VIEWER);
    tokio::spawn(follow(handle, viewer));
    let keep_alive = KeepAlive::new().interval(VIEWER_KEEPALIVE);
    Sse::new(ReceiverStream::new(events)).keep_alive(keep_alive)
}

/// Passes updates on to a viewer, until it is gone, does not keep up, or nothing more comes.
async fn follow(handle: Handle, viewer: mpsc::Sender<Result<Event, Infallible>>) {
    let mut feed = handle.journal.feed();
    let mut next = Some(Update::Snapshot(handle.snapshot()));
    while let Some(update) = next {
        let event = match update {
            Update::Snapshot(snapshot) => Event::default().event("snapshot").json_data(&*snapshot),
            Update::Step(metrics) => Event::default().event("step").json_data(metrics),
            Update::Event(event) => Event::default().event("event").json_data(&*event),
        };
        let Ok(event) = event else { return };
        if viewer.send_timeout(Ok(event), VIEWER_PATIENCE).await.is_err() {
            return;
        }
        next = tokio::select! {
            // It lags behind, or nothing more comes.
            update = feed.recv() => update.ok(),
            () = viewer.closed() => None,
        };
    }
}
