//! The live page in a real browser, on a real run. Everything that is waited for here must come
//! by itself: each page is loaded once, and a mark on its window shows that it stayed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails where it stands")]

use std::net::TcpListener;
use tests::browser::Browser;
use tests::process::{Place, Running, kill};

/// More steps than any test here waits for.
const ENDLESS: [&str; 2] = ["--steps", "100000"];

fn open(place: &Place, run: &str) -> Browser {
    place.reach(run, 1);
    let browser = Browser::start();
    browser.open(&format!("http://{}/", place.address(run).unwrap()));
    browser.wait_for("window.loadedOnce = document.querySelector('#connection').textContent === 'live'");
    browser
}

fn was_loaded_once(browser: &Browser) -> bool {
    browser.value("window.loadedOnce") == true
}

#[test]
fn a_run_is_shown_as_it_happens_with_its_curves_workers_lanes_joins_and_deaths() {
    let place = Place::new();
    let train = place.train("shown", &ENDLESS);
    let browser = open(&place, "shown");
    browser.wait_for("Number(document.querySelector('#loss').textContent) > 0");
    for place in ["#mfu", "#chart-throughput .readout span:last-of-type output"] {
        browser.wait_for(&format!("parseFloat(document.querySelector('{place}').textContent) > 0"));
    }
    browser.wait_for("document.querySelectorAll('#workers tr[data-member=true]').length === 2");
    assert_eq!(browser.text("#run"), "tiny");
    assert_eq!(browser.count("#lanes li"), 2);
    assert_eq!(browser.text("#lanes-note"), "8 lanes on 2 workers");
    assert_eq!(browser.count("#charts canvas"), 3);
    assert_eq!(browser.count("#events li[data-kind=joined]"), 2);

    let before: u64 = browser.text("#step").replace(',', "").parse().unwrap();
    let later =
        format!("Number(document.querySelector('#step').textContent.replaceAll(',', '')) > {}", before + 5);
    browser.wait_for(&later);
    let point = "Number(document.querySelector('#chart-loss output').textContent) > 0";
    browser.wait_for(point);

    // A name from outside is shown as it is, and is never markup.
    let name = "<img src=x onerror=alert(1)>";
    let address = place.address("shown").unwrap();
    let guest = Running::start(place.command(&["worker", "--join", &address, "--name", name]));
    browser.wait_for("document.querySelectorAll('#workers tr[data-member=true]').length === 3");
    browser.wait_for("document.querySelectorAll('#lanes li').length === 3");
    assert_eq!(browser.count("#events li[data-kind=joined]"), 3);
    assert_eq!(browser.text("#workers tr:last-child .name"), name);
    assert_eq!(browser.count("img"), 0);

    assert_eq!(browser.count("#events li[data-kind=lost]"), 0);
    let generation = browser.text("#generation");
    guest.signal("KILL");
    browser.wait_for("document.querySelectorAll('#events li[data-kind=lost]').length === 1");
    assert!(browser.text("#events li[data-kind=lost]").contains("is gone"));
    browser.wait_for("document.querySelectorAll('#lanes li').length === 2");
    browser.wait_for(&format!("document.querySelector('#generation').textContent !== '{generation}'"));
    assert_eq!(browser.errors(), [""; 0]);

    train.signal("INT");
    browser.wait_for(
        "document.querySelector('#connection').textContent.startsWith('the coordinator has ended')",
    );
    browser.wait_for("document.querySelectorAll('#events li[data-kind=drained]').length === 1");
    assert!(was_loaded_once(&browser));
}

#[test]
fn a_lost_connection_is_said_and_the_page_goes_on_when_the_coordinator_comes_back() {
    let place = Place::new();
    let train = place.train("lost", &ENDLESS);
    let browser = open(&place, "lost");
    let address = place.address("lost").unwrap();
    browser.wait_for("Number(document.querySelector('#loss').textContent) > 0");
    place.reach("lost", 12);
    let workers = train.children();
    train.signal("KILL");
    workers.iter().for_each(|worker| kill(*worker, "KILL"));
    drop(train);
    browser.wait_for(
        "document.querySelector('#connection').textContent.startsWith('connection lost, last seen')",
    );

    let listen = format!("cluster.listen={address}");
    let again = place.train("lost", &[&ENDLESS[..], &["--set", &listen]].concat());
    browser.wait_for("document.querySelector('#connection').textContent === 'live'");
    browser.wait_for("document.querySelector('#phase').textContent === 'running'");
    browser.wait_for("Number(document.querySelector('#step').textContent.replaceAll(',', '')) > 15");
    assert!(was_loaded_once(&browser));
    drop(again);
}

#[test]
fn while_a_restarted_coordinator_waits_for_a_member_the_page_says_that_it_recovers() {
    let place = Place::new();
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let listen = format!("cluster.listen=\"{listen}\"");
    let start = || {
        let what = ["coordinator", "run.toml", "--run", "back", "--set", &listen];
        // As long as this test waits: nobody is given up.
        let patience = ["--set", "cluster.detect=\"100s\""];
        Running::start(place.command(&[&what[..], &patience, &ENDLESS].concat()))
    };
    let mut first = start();
    first.wait_for("workers join with");
    let address = place.address("back").unwrap();
    let workers: Vec<Running> =
        (0..2).map(|_| Running::start(place.command(&["worker", "--join", &address]))).collect();
    first.wait_for("with 2 workers");
    let browser = open(&place, "back");
    // Stopped, it is missed by the coordinator, and by its peer only when it does not answer.
    workers[1].signal("STOP");
    first.signal("KILL");
    drop(first);
    browser.wait_for("document.querySelector('#connection').dataset.state === 'lost'");
    let _second = start();
    browser.wait_for("document.querySelector('#phase').textContent === 'recovering'");
    browser.wait_for("document.querySelector('#connection').textContent === 'live'");
    browser.wait_for("document.querySelectorAll('#events li[data-kind=reattached]').length === 1");
    let tone = |of: &str, name: &str| {
        browser.value(&format!("getComputedStyle(document.querySelector('{of}')).getPropertyValue('{name}')"))
    };
    assert_eq!(tone("#phase", "--tone"), tone(":root", "--warn"));
    workers[1].signal("CONT");
    browser.wait_for("document.querySelector('#phase').textContent === 'running'");
    browser.wait_for("document.querySelectorAll('#events li[data-kind=recovered]').length === 1");
    // That nobody answered for a while is noted, and no error of the page.
    let errors: Vec<String> = browser.errors().into_iter().filter(|e| !e.contains("net::ERR_")).collect();
    assert_eq!(errors, [""; 0]);
    assert!(was_loaded_once(&browser));
}

#[test]
fn the_stages_of_a_pipeline_stand_below_each_other_and_can_be_read() {
    let place = Place::new();
    let _train =
        place.train("stages", &[&ENDLESS[..], &["--workers", "4", "--set", "cluster.stages=2"]].concat());
    let browser = open(&place, "stages");
    browser.wait_for("document.querySelectorAll('#lanes li').length === 4");
    assert_eq!(browser.text("#lanes-note"), "8 lanes on 2 pipelines of 4 workers");
    let boxes = "[...document.querySelectorAll('#lanes li')].map((li) => li.getBoundingClientRect())";
    let places = browser.value(&format!("new Set({boxes}.map((box) => `${{box.x}} ${{box.y}}`)).size"));
    assert_eq!(places, 4, "one place each");
    let rows = browser.value(&format!("new Set({boxes}.map((box) => box.y)).size"));
    assert_eq!(rows, 2);
    let cut = "[...document.querySelectorAll('#lanes li')].some((li) => li.scrollHeight > li.clientHeight)";
    assert_eq!(browser.value(cut), false, "nothing is cut off");
}

#[test]
fn curves_forget_what_was_rolled_back_follow_their_values_and_stay_within_memory() {
    let place = Place::new();
    let _train = place.train("curves", &ENDLESS);
    let browser = open(&place, "curves");
    let history = |script: &str| {
        browser.value(&format!(
            "import('/history.js').then(({{ Steps, Generations }}) => {{
                const metrics = (step, loss) => ({{ step, loss, norm: 1, learning_rate: 1, tokens_per_second: 1, workers: 1 }});
                {script}
            }})"
        ))
    };
    let fill =
        "const steps = new Steps(); for (let s = 1; s <= 50000; s++) steps.push(metrics(s, 9 - s / 10000));";

    let again = "const steps = new Steps(); for (const s of [1, 2, 3, 4, 5, 3]) steps.push(metrics(s, 1)); return steps.step;";
    assert_eq!(history(again), serde_json::json!([1, 2, 3]));

    let bounded = format!(
        "{fill} const newest = steps.step.slice(-2000);
         return [steps.length <= 20000, steps.step[0], steps.last, newest.every((s, i) => s === 48001 + i)];"
    );
    assert_eq!(history(&bounded), serde_json::json!([true, 1, 50000, true]));

    let smooth = format!(
        "{fill} const smooth = steps.smooth('loss'); return Math.abs(smooth.at(-1) - steps.loss.at(-1));"
    );
    assert!(history(&smooth).as_f64().unwrap() < 0.01, "a smooth curve that trails behind");

    let hole = "const steps = new Steps(); for (const loss of [2, null, 2]) steps.push(metrics(steps.last + 1, loss));
                return steps.smooth('loss').map((v) => v.toFixed(6));";
    assert_eq!(history(hole), serde_json::json!(["2.000000", "2.000000", "2.000000"]));

    let causes = "const g = new Generations();
        for (const e of [{kind: 'joined'}, {kind: 'planned', base: 0}, {kind: 'lost', reason: 'silent'}, {kind: 'joined'},
                         {kind: 'planned', base: 8}, {kind: 'lost', reason: 'left'}, {kind: 'planned', base: 9},
                         {kind: 'rolled_back', to: 8}]) g.note(e);
        return g.marks.map((mark) => `${mark.step} ${mark.cause}`);";
    assert_eq!(history(causes), serde_json::json!(["0 join", "8 loss"]));
}
