//! A real browser without a window: Debian's chromium, driven by its own `chromedriver` over
//! WebDriver, which is JSON over plain HTTP. That needs no crate, only these few requests.

use crate::process::until;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

const HOW_TO_INSTALL: &str = "this test needs a browser and its driver; install them with: apt-get install -y chromium chromium-driver";

/// Where nobody watches: no window, no first-run pages, and no requests of its own. Without its
/// sandbox, which root (as in a container) cannot use; it only ever sees our own page.
const ARGUMENTS: [&str; 10] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
];

/// A browser with one page. It ends when this is dropped.
pub struct Browser {
    driver: Child,
    address: String,
    session: String,
}

impl Browser {
    /// Starts a browser.
    ///
    /// # Panics
    /// Where chromium or its driver is not installed, with how to install it.
    #[must_use]
    pub fn start() -> Self {
        let mut command = Command::new("chromedriver");
        command.arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null());
        let mut driver = command.spawn().unwrap_or_else(|e| panic!("chromedriver: {e}: {HOW_TO_INSTALL}"));
        let mut said = BufReader::new(driver.stdout.take().unwrap()).lines().map_while(Result::ok);
        let port: u16 = said
            .find_map(|line| line.split("successfully on port ").nth(1)?.trim_end_matches('.').parse().ok())
            .expect("chromedriver says on which port it listens");
        // What else it says is read and forgotten, so that it never waits for a reader.
        std::thread::spawn(move || said.for_each(drop));
        let mut browser = Self { driver, address: format!("127.0.0.1:{port}"), session: String::new() };
        let options = json!({ "browserName": "chrome", "goog:loggingPrefs": { "browser": "ALL" },
                              "goog:chromeOptions": { "args": ARGUMENTS } });
        let session = browser.ask("POST", "/session", &json!({ "capabilities": { "alwaysMatch": options } }));
        let session = session.unwrap_or_else(|e| panic!("chromium does not start: {e}: {HOW_TO_INSTALL}"));
        browser.session = format!("/session/{}", session["sessionId"].as_str().unwrap());
        browser
    }

    /// Opens a page.
    ///
    /// # Panics
    /// Where it cannot be loaded.
    pub fn open(&self, url: &str) {
        self.ask("POST", &format!("{}/url", self.session), &json!({ "url": url })).unwrap();
    }

    /// The value of a JavaScript expression on the page.
    ///
    /// # Panics
    /// Where it throws.
    #[must_use]
    pub fn value(&self, expression: &str) -> Value {
        let script = json!({ "script": format!("return ({expression})"), "args": [] });
        self.ask("POST", &format!("{}/execute/sync", self.session), &script)
            .unwrap_or_else(|e| panic!("{expression}: {e}"))
    }

    /// The text of the first element that a CSS selector finds; empty where there is none.
    #[must_use]
    pub fn text(&self, selector: &str) -> String {
        let text = self.value(&format!("document.querySelector({selector:?})?.textContent"));
        text.as_str().unwrap_or_default().to_owned()
    }

    /// How many elements a CSS selector finds.
    #[must_use]
    pub fn count(&self, selector: &str) -> u64 {
        self.value(&format!("document.querySelectorAll({selector:?}).length")).as_u64().unwrap()
    }

    /// Waits until a JavaScript expression is true.
    ///
    /// # Panics
    /// Where that takes too long, with what the page shows instead.
    pub fn wait_for(&self, expression: &str) {
        until(expression, || self.value(expression).as_bool().filter(|&yes| yes));
    }

    /// Errors that the browser has noted: scripts that threw, files that were refused by policy.
    ///
    /// # Panics
    /// Where the browser is gone.
    #[must_use]
    pub fn errors(&self) -> Vec<String> {
        let log =
            self.ask("POST", &format!("{}/se/log", self.session), &json!({ "type": "browser" })).unwrap();
        let severe = log.as_array().unwrap().iter().filter(|entry| entry["level"] == "SEVERE");
        severe.map(|entry| entry["message"].to_string()).collect()
    }

    /// One request: the answer's value, or what the driver says is wrong.
    fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let (status, answer) = self.request(method, path, &body.to_string()).map_err(|e| e.to_string())?;
        let mut answer: Value = serde_json::from_str(&answer).map_err(|e| format!("{e}: {answer}"))?;
        let value = answer["value"].take();
        if status == 200 { Ok(value) } else { Err(format!("{}: {}", value["error"], value["message"])) }
    }

    fn request(&self, method: &str, path: &str, body: &str) -> std::io::Result<(u16, String)> {
        let mut stream = TcpStream::connect(&self.address)?;
        let (address, length) = (&self.address, body.len());
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let mut stream = BufReader::new(stream);
        let (mut line, mut status, mut length) = (String::new(), 0, 0);
        while stream.read_line(&mut line)? > 2 {
            let lower = line.to_ascii_lowercase();
            if let Some(rest) = lower.strip_prefix("http/1.1 ") {
                status = rest.split(' ').next().and_then(|s| s.parse().ok()).unwrap_or(0);
            } else if let Some(rest) = lower.strip_prefix("content-length:") {
                length = rest.trim().parse().unwrap_or(0);
            }
            line.clear();
        }
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer)?;
        Ok((status, String::from_utf8_lossy(&answer).into_owned()))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ending the session ends the browser; the driver is ours to end. Where one of them is
        // gone already there is nothing left to do.
        if !self.session.is_empty() {
            self.request("DELETE", &self.session, "").ok();
        }
        self.driver.kill().ok();
        self.driver.wait().ok();
    }
}
