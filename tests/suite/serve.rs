//! `cuvee serve` as a client sees it: the real program on a free port, spoken to over plain sockets.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use cuvee::data::Tokenizer;
use cuvee::model::Checkpoint;
use serde_json::{Value, json};

use crate::common::tiny;
use crate::program::{Running, Workspace};

/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

struct Server {
    child: Child,
    port: u16,
    workspace: Workspace,
}

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The data of server-sent events, without the end, which must be there.
    fn events(&self) -> Vec<Value> {
        let lines: Vec<&str> = self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        let (end, events) = lines.split_last().expect("a stream has an end");
        assert_eq!(*end, "[DONE]");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    #[track_caller]
    fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The message of an error in OpenAI's shape.
    #[track_caller]
    fn refused(&self, status: u16, param: &str, part: &str) {
        let error = &self.json()["error"];
        assert_eq!(self.status, status, "{}", self.body);
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{error}");
        assert!(error["message"].as_str().unwrap().contains(part), "{error} lacks {part:?}");
        assert!(error["type"].is_string() && error.get("code").is_some(), "{error}");
    }
}

impl Server {
    /// The shipped model with two adapters of random numbers, a and b.
    fn start(flags: &[&str]) -> Self {
        let workspace = Workspace::new();
        let checkpoint = Checkpoint::open(&workspace.path("model")).unwrap();
        for (name, rank, seed) in [("a", 2, 1), ("b", 5, 2)] {
            tiny::write_adapter(&checkpoint, &workspace.path(name), rank, seed);
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_cuvee"))
            .args([
                "serve",
                "--model",
                "model",
                "--adapter",
                "a=a",
                "--adapter",
                "b=b",
                "--port",
                "0",
                "--threads",
                "2",
            ])
            .args(flags)
            .current_dir(workspace.path("."))
            .env_remove("CUVEE_API_KEY")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (said, port) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if let Some(at) = line.split("listening on http://").nth(1) {
                    let _ = said.send(at.rsplit(':').next().unwrap().parse().unwrap());
                }
            }
        });
        let port = port.recv_timeout(PATIENCE).expect("it listens");
        Self { child, port, workspace }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn send(&self, head: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let head = format!("{head}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        stream
    }

    fn get(&self, path: &str) -> Answer {
        read(self.send(&format!("GET {path} HTTP/1.1"), b""))
    }

    fn post_stream(&self, path: &str, body: &Value) -> TcpStream {
        self.send(&format!("POST {path} HTTP/1.1\r\nContent-Type: application/json"), body.to_string().as_bytes())
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        read(self.post_stream(path, body))
    }

    fn complete(&self, body: Value) -> Answer {
        self.post("/v1/completions", &body)
    }

    /// What `cuvee generate` makes of the prompt `The film was`, taking the likeliest tokens.
    fn generated(&self, tokens: &str, adapters: &[&str]) -> Value {
        let start = ["generate", "--model", "model", "--prompt", "The film was", "--temperature", "0", "--json"];
        let args = [&start[..], &["--threads", "2", "--max-new-tokens", tokens], adapters].concat();
        let finished = Running::new(&mut self.workspace.command_of(&args)).wait();
        serde_json::from_str(&finished.stdout).unwrap_or_else(|_| panic!("{}", finished.stderr))
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn signal(&self, signal: i32) {
        // SAFETY: a signal to the child that was started here and that nobody has waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// How it ended, in time.
    fn ended(&mut self) -> std::process::ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "it does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer to its end.
fn read(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let header = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_string()));
    let headers: BTreeMap<String, String> = lines.filter_map(header).collect();
    let chunked = headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked");
    Answer { status, body: if chunked { unchunked(body) } else { body.to_string() }, headers }
}

fn unchunked(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        text += &rest[..size];
        body = rest[size..].strip_prefix("\r\n").unwrap();
    }
    text
}

fn text(answer: &Value) -> String {
    answer["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{answer}")).to_string()
}

#[track_caller]
fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn every_route_answers_as_openai_does() {
    let server = Server::start(&["--name", "base", "--audit-log", "audit.jsonl"]);
    assert_eq!(server.get("/health").ok(), json!({"status": "ok"}));
    let models = server.get("/v1/models").ok();
    let names: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "a", "b"]);
    assert_eq!(server.get("/v1/models/b").ok()["parent"], "base");
    server.get("/v1/models/c").refused(404, "", "there is no \"c\"");
    server.get("/v1/completions").refused(405, "", "POST");
    server.get("/").refused(404, "", "/v1/chat/completions");

    let asked = json!({"model": "base", "prompt": "The film was", "max_tokens": 12, "temperature": 0, "n": 2});
    let whole = server.complete(asked.clone()).ok();
    assert_eq!((&whole["object"], &whole["model"]), (&json!("text_completion"), &json!("base")));
    assert_eq!(whole["choices"].as_array().unwrap().len(), 2);
    assert_eq!(whole["choices"][0]["text"], whole["choices"][1]["text"], "both take the likeliest");
    let usage = &whole["usage"];
    assert!(
        usage["prompt_tokens"].as_u64().unwrap() > 0
            && usage["total_tokens"].as_u64() > usage["prompt_tokens"].as_u64()
    );
    assert!(["stop", "length"].contains(&whole["choices"][0]["finish_reason"].as_str().unwrap()));
    // What `cuvee generate` writes of the same.
    let generated = server.generated("12", &[]);
    assert_eq!(generated["completion"], whole["choices"][0]["text"]);

    // A list of prompts, one as tokens, is what each is alone.
    let ids = json!([5, 6, 7]);
    let both = server.complete(json!({"prompt": ["The film", "A"], "max_tokens": 5, "seed": 3})).ok();
    for (at, prompt) in ["The film", "A"].into_iter().enumerate() {
        let alone = server.complete(json!({"prompt": prompt, "max_tokens": 5, "seed": 3})).ok();
        assert_eq!(both["choices"][at]["text"].as_str().unwrap(), text(&alone));
    }
    // Equal prompts are drawn for apart, unless a seed is named.
    let texts = |asked: Value| {
        let answer = server.complete(asked).ok();
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].to_string()).collect::<HashSet<_>>()
    };
    assert_eq!(texts(json!({"prompt": ["A", "A", "A"], "max_tokens": 20})).len(), 3);
    assert_eq!(texts(json!({"prompt": ["A", "A", "A"], "max_tokens": 20, "seed": 3})).len(), 1);
    let one = server.complete(json!({"prompt": ids, "max_tokens": 5, "seed": 3})).ok();
    let list = server.complete(json!({"prompt": [ids], "max_tokens": 5, "seed": 3})).ok();
    assert_eq!(text(&one), text(&list));

    let log: Vec<Value> = server.workspace.lines("audit.jsonl").into_iter().map(Value::Object).collect();
    assert_eq!(log.len(), 8, "one for each completion request");
    assert!(log.iter().all(|entry| entry.get("prompts").is_none() && entry["ended"] == "done"), "{log:?}");
    assert!(!server.workspace.text("audit.jsonl").contains("film"));
    // An answer is on its way before the room that it had is counted as free.
    wait_for("nothing runs", || server.metric("cuvee_running") == 0.0);
    assert!(server.metric("cuvee_completion_tokens_total") > 20.0);
}

#[test]
fn streams_say_what_whole_answers_say() {
    let server = Server::start(&[]);
    for stop in [json!(null), json!("the"), json!(["e", " a"])] {
        let mut asked = json!({"prompt": "The film was", "max_tokens": 30, "seed": 5, "n": 2, "logprobs": 2, "echo": true, "stop": stop, "soup": {"a": 0.05}});
        let whole = server.complete(asked.clone()).ok();
        asked["stream"] = true.into();
        asked["stream_options"] = json!({"include_usage": true});
        let answer = server.complete(asked);
        assert_eq!(answer.headers["content-type"], "text/event-stream");
        let mut events = answer.events();
        let last = events.pop().unwrap();
        assert_eq!((&last["usage"], &last["choices"]), (&whole["usage"], &json!([])));
        for (at, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            let parts = events.iter().map(|event| &event["choices"][0]).filter(|part| part["index"] == at);
            let parts: Vec<&Value> = parts.collect();
            let text: String = parts.iter().map(|part| part["text"].as_str().unwrap()).collect();
            assert_eq!(text, choice["text"].as_str().unwrap());
            assert_eq!(parts.last().unwrap()["finish_reason"], choice["finish_reason"]);
            assert!(parts[..parts.len() - 1].iter().all(|part| part["finish_reason"].is_null()));
            for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let told = parts.iter().flat_map(|part| part["logprobs"][list].as_array().unwrap().clone());
                assert_eq!(Value::Array(told.collect()), choice["logprobs"][list], "{list}");
            }
        }
    }
}

#[test]
fn echoed_prompts_are_scored_as_logps_scores_them() {
    let server = Server::start(&[]);
    let prompt = "The film was good, and the actors were";
    let of = |max_tokens: u64| {
        server
            .complete(
                json!({"prompt": prompt, "max_tokens": max_tokens, "echo": true, "logprobs": 1, "temperature": 0}),
            )
            .ok()
    };
    let (scored, more) = (of(0), of(1));
    let told = |answer: &Value| answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    let tokens = scored["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!((text(&scored), scored["usage"]["completion_tokens"].as_u64()), (prompt.to_string(), Some(0)));
    assert_eq!(told(&scored).len(), tokens);
    assert_eq!(told(&more)[..tokens], told(&scored)[..]);
    assert_eq!(told(&more).len(), tokens + 1);
    assert!(told(&scored)[0].is_null() && told(&scored)[1..].iter().all(|logp| logp.as_f64().unwrap() < 0.0));
    // What a harness asks of it: whether a token was the likeliest.
    let last = &more["choices"][0]["logprobs"]["top_logprobs"][tokens];
    let likeliest = last.as_object().unwrap().values().map(|logp| logp.as_f64().unwrap()).fold(f64::MIN, f64::max);
    assert_eq!(told(&more)[tokens].as_f64().unwrap(), likeliest, "temperature 0 takes it");

    // What `cuvee logps` says of it as a completion, which ends with the end-of-text token.
    let tokenizer = Tokenizer::load(&server.workspace.path("model")).unwrap();
    let row = json!({"prompt": "The film was", "chosen": " good, and the actors were", "rejected": " bad"});
    server.workspace.write_lines("rows.jsonl", &[row]);
    server.workspace.ok("logps --model model --dataset rows.jsonl --out logps.jsonl");
    let expected = &server.workspace.lines("logps.jsonl")[0];
    let ended = format!("{prompt}{}", tokenizer.eos().unwrap().1);
    let asked = json!({"prompt": ended, "max_tokens": 0, "echo": true, "logprobs": 0});
    let (told, count) = (told(&server.complete(asked).ok()), expected["tokens_chosen"].as_u64().unwrap() as usize);
    let sum: f64 = told[told.len() - count..].iter().map(|logp| logp.as_f64().unwrap()).sum();
    let expected = expected["logps_chosen"].as_f64().unwrap();
    assert!((sum - expected).abs() < 1e-4, "{sum}, and {expected} of logps");
}

#[test]
fn a_blend_is_what_it_is_alone_and_says_what_it_is_made_of() {
    let server = Server::start(&["--soup-range", "b=-1..0.5", "--audit-log", "audit.jsonl", "--audit-prompts"]);
    let asked = |soup: Value| json!({"prompt": "The film was", "max_tokens": 16, "temperature": 0, "soup": soup});
    let answer = server.complete(asked(json!({"a": 0.0625, "b": -0.03125})));
    let line = answer.headers["x-cuvee-soup"].clone();
    let made = answer.ok();
    let adapters = made["cuvee"]["adapters"].as_array().unwrap();
    assert_eq!(adapters.iter().map(|a| a["weight"].as_f64().unwrap()).collect::<Vec<_>>(), [0.0625, -0.03125]);
    assert!(line.starts_with("review-llama-656k@") || line.starts_with("model@"), "{line}");
    assert!(line.contains("; a=0.0625@") && line.contains("; b=-0.03125@"), "{line}");
    for (at, name) in ["a", "b"].into_iter().enumerate() {
        let known = server.workspace.ok(&format!("lineage {name} --json")).stdout;
        let known: Value = serde_json::from_str(&known).unwrap();
        assert_eq!(known["hash"], adapters[at]["hash"]);
    }
    // The adapters beside the model, loaded with these weights.
    let generated = server.generated("16", &["--adapter", "a=0.0625", "--adapter", "b=-0.03125"]);
    assert_eq!(generated["completion"], made["choices"][0]["text"]);
    // A weight of nothing is the base, and a model's name is all of an adapter.
    assert_eq!(text(&server.complete(asked(json!({}))).ok()), text(&server.complete(asked(json!({"a": 0}))).ok()));
    let mut whole = asked(Value::Null);
    whole["model"] = "a".into();
    assert_eq!(text(&server.complete(whole).ok()), text(&server.complete(asked(json!({"a": 1}))).ok()));

    server.complete(asked(json!({"b": 0.6}))).refused(400, "soup.b", "not from -1 to 0.5");
    server.complete(asked(json!({"a": 1.5}))).refused(400, "soup.a", "not from 0 to 1");
    server.complete(asked(json!({"c": 1}))).refused(400, "soup.c", "there are a, b");
    server.complete(asked(json!({"../b": 1}))).refused(400, "soup.../b", "no such adapter");
    let log = server.workspace.lines("audit.jsonl");
    assert_eq!(log[0]["prompts"], json!(["The film was"]));
    assert_eq!(log[0]["texts"][0], made["choices"][0]["text"]);
    assert_eq!(log[0]["made_of"]["adapters"], made["cuvee"]["adapters"]);
}

#[test]
fn bad_requests_are_told_what_is_wrong_and_harm_nobody() {
    let server =
        Server::start(&["--max-context", "64", "--max-tokens", "20", "--max-body", "16KiB", "--max-completions", "4"]);
    let with = |field: &str, value: Value| {
        let mut asked = json!({"prompt": "The film", "max_tokens": 2});
        asked[field] = value;
        server.complete(asked)
    };
    for (field, value, part) in [
        ("temperature", json!("hot"), "\"hot\" is not a number from 0 to 100"),
        ("temperature", json!(-1), "-1 is not"),
        ("top_p", json!(0), "0 is not"),
        ("n", json!(0), "0 is not a whole number from 1 to 4"),
        ("prompt", json!(null), "is missing"),
        ("prompt", json!({}), "expected a string"),
        ("prompt", json!([1, "x"]), "no token of this model"),
        ("prompt", json!([99999999]), "no token of this model"),
        ("prompt", json!([]), "0 prompts"),
        ("prompt", json!(["a", "b", "c", "d", "e"]), "5 prompts"),
        ("max_tokens", json!(21), "21 is more than the 20"),
        ("max_tokens", json!(0), "\"echo\": true"),
        ("stop", json!([""]), "is not a string of 1 to"),
        ("logprobs", json!(21), "21 is not"),
        ("soup", json!([1]), "[1] is not an object"),
        ("frequency_penalty", json!(1), "is not supported"),
        ("best_of", json!(3), "is not supported"),
        ("stream_options", json!({}), "does nothing without"),
        ("adapter_path", json!("/etc/passwd"), "no such field"),
    ] {
        with(field, value).refused(400, field, part);
    }
    with("model", json!("gpt-4")).refused(404, "model", "there are");
    with("prompt", json!("The film was good. ".repeat(40))).refused(400, "max_tokens", "are more than the 64");
    server.post("/v1/chat/completions", &json!({"messages": []})).refused(400, "messages", "there is none");
    server.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "Hi"}]})).refused(
        400,
        "messages",
        "no chat template",
    );

    let json = "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json";
    read(server.send(json, b"{\"prompt\": ")).refused(400, "", "not JSON");
    read(server.send(json, "[".repeat(9000).as_bytes())).refused(400, "", "not JSON");
    read(server.send(json, b"\xff\xfe")).refused(400, "", "not JSON");
    read(server.send("POST /v1/completions HTTP/1.1", b"{}")).refused(415, "", "application/json");
    let mut huge = server.connect();
    huge.write_all(
        format!("{json}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 1000000000\r\n\r\n").as_bytes(),
    )
    .unwrap();
    let sent = (0..1000).try_for_each(|_| huge.write_all(&[b' '; 4096]));
    // It may hang up on who keeps sending; if it says why, it says so.
    let mut said = String::new();
    if huge.read_to_string(&mut said).is_ok() && !said.is_empty() {
        assert!(said.starts_with("HTTP/1.1 413"), "{said}");
    } else {
        assert!(sent.is_err() || said.is_empty());
    }
    let mut foreign = server.connect();
    foreign.write_all(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n").unwrap();
    read(foreign).refused(403, "", "answers to localhost only");
    let mut nonsense = server.connect();
    nonsense.write_all(b"\x16\x03\x01\x02\x00 what\r\n\r\n").unwrap();
    assert!(read(nonsense).status == 400);
    server.complete(json!({"prompt": "The film", "max_tokens": 2})).ok();
    wait_for("nothing runs", || server.metric("cuvee_running") + server.metric("cuvee_cache_rows_used") == 0.0);
}

#[test]
fn a_key_is_wanted_where_others_can_reach_it() {
    let workspace = Workspace::new();
    let part = "--host: 0.0.0.0 can be reached from other machines; give --api-key-file";
    workspace.fails(1, "serve --model model --host 0.0.0.0 --port 0", &[part]);
    drop(workspace);
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key.txt");
    std::fs::write(&key, "secret\n").unwrap();
    let server = Server::start(&["--host", "0.0.0.0", "--api-key-file", key.to_str().unwrap()]);
    let asked = json!({"prompt": "A", "max_tokens": 1});
    for path in ["/v1/models", "/metrics"] {
        server.get(path).refused(401, "", "Authorization: Bearer KEY");
    }
    server.complete(asked.clone()).refused(401, "", "API key");
    server.get("/health").ok();
    let send = |key: &str| {
        let head =
            format!("POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}");
        read(server.send(&head, asked.to_string().as_bytes()))
    };
    send("secre").refused(401, "", "API key");
    send("secret").ok();
}

#[test]
fn slow_and_dead_clients_hold_nothing() {
    let server = Server::start(&["--patience", "1", "--max-connections", "8", "--max-context", "2048"]);
    // Half a header, half a body, and nothing at all.
    let mut half = server.connect();
    half.write_all(b"POST /v1/comp").unwrap();
    let mut body = server.connect();
    body.write_all(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
    )
    .unwrap();
    let silent = server.connect();
    server.complete(json!({"prompt": "A", "max_tokens": 2})).ok();
    for mut stream in [half, silent] {
        let mut rest = Vec::new();
        assert!(stream.read_to_end(&mut rest).is_ok() && rest.len() < 1000, "it is let go");
    }
    read_some(body, "408");

    // Who leaves in the middle frees its place, streaming or not.
    for stream in [true, false] {
        let before = server.metric("cuvee_abandoned_total");
        let asked = json!({"prompt": "The film", "max_tokens": 2000, "ignore_eos": true, "stream": stream, "n": 4});
        let client = server.post_stream("/v1/completions", &asked);
        wait_for("it runs", || server.metric("cuvee_running") > 0.0);
        drop(client);
        wait_for("it is given up", || server.metric("cuvee_abandoned_total") > before);
        wait_for("its room is free", || server.metric("cuvee_cache_rows_used") == 0.0);
    }
    wait_for("connections end", || server.metric("cuvee_connections") <= 1.0);

    // More connections than there may be are turned away.
    let held: Vec<TcpStream> = (0..8).map(|_| server.connect()).collect();
    wait_for("they are there", || {
        let mut stream = server.connect();
        let _ = stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let mut said = String::new();
        let _ = stream.read_to_string(&mut said);
        said.starts_with("HTTP/1.1 503")
    });
    drop(held);
    wait_for("there is room again", || {
        let mut stream = server.connect();
        let _ = stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        let mut said = String::new();
        stream.read_to_string(&mut said).is_ok() && said.starts_with("HTTP/1.1 200")
    });
}

fn read_some(mut stream: TcpStream, status: &str) {
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert!(said.contains(status), "{said:?}");
}

#[test]
fn a_full_queue_says_so() {
    let server = Server::start(&["--max-running", "1", "--max-queue", "1", "--max-context", "2048"]);
    let long = json!({"prompt": "The film", "max_tokens": 2000, "stream": true, "ignore_eos": true});
    let runs = server.post_stream("/v1/completions", &long);
    wait_for("one runs", || server.metric("cuvee_running") == 1.0);
    let waits = server.post_stream("/v1/completions", &long);
    wait_for("one waits", || server.metric("cuvee_waiting") == 1.0);
    let answer = server.complete(json!({"prompt": "A", "max_tokens": 1}));
    answer.refused(429, "", "ask again");
    assert_eq!(answer.headers["retry-after"], "1");
    drop([runs, waits]);
    wait_for("it is free", || server.complete(json!({"prompt": "A", "max_tokens": 1})).status == 200);
}

#[test]
fn sixty_four_clients_get_what_each_gets_alone() {
    let server = Server::start(&["--max-running", "24", "--max-context", "128"]);
    let asked = |i: usize| {
        let soup = json!({"a": i as f64 / 640.0, "b": (63 - i) as f64 / 900.0});
        let prompt = ["The film was", "I", "An actor who", "It is not"][i % 4];
        let stop = if i.is_multiple_of(3) { json!(["the"]) } else { json!(null) };
        json!({"prompt": prompt, "max_tokens": 5 + i % 40, "temperature": (i % 2) as f64, "seed": i, "soup": soup, "stop": stop, "logprobs": 1})
    };
    let alone: Vec<Value> = (0..64).map(|i| server.complete(asked(i)).ok()).collect();
    let until = Instant::now() + Duration::from_secs(4);
    thread::scope(|scope| {
        for i in 0..64 {
            let (server, alone) = (&server, &alone);
            scope.spawn(move || {
                let mut answers = 0;
                while Instant::now() < until || answers == 0 {
                    let mut request = asked(i);
                    request["stream"] = (answers % 2 == 1).into();
                    let answer = server.complete(request);
                    if answers % 2 == 1 {
                        let text: String = answer
                            .events()
                            .iter()
                            .map(|event| event["choices"][0]["text"].as_str().unwrap().to_string())
                            .collect();
                        assert_eq!(text, self::text(&alone[i]), "client {i}");
                    } else {
                        assert_eq!(answer.ok()["choices"], alone[i]["choices"], "client {i}");
                    }
                    answers += 1;
                }
            });
        }
    });
    wait_for("nothing runs", || server.metric("cuvee_running") + server.metric("cuvee_waiting") == 0.0);
}

#[test]
fn it_finishes_what_runs_when_asked_to_stop() {
    let mut server = Server::start(&["--max-context", "2048"]);
    let asked = json!({"prompt": "The film", "max_tokens": 300, "stream": true, "ignore_eos": true});
    let client = server.post_stream("/v1/completions", &asked);
    wait_for("it runs", || server.metric("cuvee_running") > 0.0);
    server.signal(libc::SIGTERM);
    let answer = read(client);
    assert!(!answer.events().is_empty(), "the stream has its end");
    assert!(server.ended().success());
    assert!(TcpStream::connect(("127.0.0.1", server.port)).is_err());
}

#[test]
fn a_killed_server_leaves_whole_lines_and_starts_again() {
    let mut server = Server::start(&["--audit-log", "audit.jsonl", "--max-context", "2048"]);
    server.complete(json!({"prompt": "A", "max_tokens": 2})).ok();
    let asked = json!({"prompt": "The film", "max_tokens": 2000, "stream": true, "ignore_eos": true});
    let mut client = server.post_stream("/v1/completions", &asked);
    let mut some = [0; 400];
    client.read_exact(&mut some).unwrap();
    server.signal(libc::SIGKILL);
    assert!(!server.ended().success());
    let mut rest = String::new();
    let _ = client.read_to_string(&mut rest);
    assert!(!rest.contains("[DONE]"), "a stream that broke has no end");
    assert_eq!(server.workspace.lines("audit.jsonl").len(), 1);
    Server::start(&[]).complete(json!({"prompt": "A", "max_tokens": 2})).ok();
}
