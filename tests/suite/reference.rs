//! Documents that are generated from the code, and the links between all of them. `FHIRLAKE_UPDATE=1` generates them
//! again.

use std::path::{Path, PathBuf};

use fhirlake::config::{environment, pipeline_json_schema};
use fhirlake::telemetry::METRICS;
use serde_json::Value;

fn docs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name)
}

/// Holds a document to what it should say, or writes it.
fn hold(path: &Path, now: &str) {
    if environment("FHIRLAKE_UPDATE").is_some() {
        std::fs::write(path, now).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap();
    assert!(committed == now, "run `FHIRLAKE_UPDATE=1 cargo test --release reference` and commit {}", path.display());
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// The definition that a key's value is of.
fn named(property: &Value) -> Option<&str> {
    let of = |value: &Value| {
        value.get("$ref").and_then(Value::as_str).map(|text| text.rsplit('/').next().unwrap().to_owned())
    };
    let direct =
        of(property).or_else(|| property["anyOf"].as_array()?.iter().find_map(of)).or_else(|| of(&property["items"]));
    direct.map(|name| -> &str { Box::leak(name.into_boxed_str()) })
}

fn kind(property: &Value, definitions: &Value) -> String {
    let is_section = |name: &str| definitions[name]["properties"].is_object();
    if let Some(name) = named(property) {
        let list = property["type"] == "array";
        if is_section(name) {
            return format!("{}[{name}](#{})", if list { "list of " } else { "" }, name.to_lowercase());
        }
        let choices =
            definitions[name]["oneOf"].as_array().into_iter().flatten().filter_map(|choice| choice["const"].as_str());
        let choices: Vec<String> = choices.map(|choice| format!("`{choice}`")).collect();
        return if choices.is_empty() { name.to_owned() } else { choices.join(", ") };
    }
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let plain = text(&property["type"]).or_else(|| {
        property["type"].as_array()?.iter().filter_map(Value::as_str).find(|name| *name != "null").map(str::to_owned)
    });
    match plain.as_deref() {
        Some("array") => format!("list of {}s", property["items"]["type"].as_str().unwrap_or("value")),
        Some(name) => name.to_owned(),
        None => "text".to_owned(),
    }
}

/// Wraps a list item at 100 columns; code in backticks is not broken.
fn item(out: &mut String, text: &str) {
    let mut line = String::from("*");
    for word in text.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > 100 {
            out.push_str(&line);
            out.push('\n');
            line = " ".to_owned();
        }
        line.push(' ');
        line.push_str(word);
    }
    out.push_str(&line);
    out.push('\n');
}

/// Wraps a paragraph at 100 columns.
fn paragraph(out: &mut String, text: &str) {
    let mut list = String::new();
    item(&mut list, text);
    for line in list.lines() {
        out.push_str(line.trim_start_matches("* ").trim_start());
        out.push('\n');
    }
    out.push('\n');
}

fn keys(out: &mut String, section: &Value, definitions: &Value) {
    let required: Vec<&str> = section["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (key, property) in section["properties"].as_object().unwrap() {
        let what = property["description"].as_str().map(str::to_owned);
        let what = what
            .or_else(|| definitions[named(property)?]["description"].as_str().map(str::to_owned))
            .unwrap_or_default();
        let default = match &property["default"] {
            _ if required.contains(&key.as_str()) => ", required".to_owned(),
            Value::Null | Value::Object(_) => String::new(),
            value => format!(", default `{}`", value.to_string().replace("\",\"", "\", \"")),
        };
        item(out, &format!("**`{key}`** ({}{default}): {what}", kind(property, definitions)));
    }
    out.push('\n');
}

const GENERATED: &str = "<!-- Generated from the code: FHIRLAKE_UPDATE=1 cargo test --release reference -->\n\n";

// The reference of the pipeline file, from the structs that it is read into.
#[test]
fn the_reference_is_the_structs() {
    let schema = pipeline_json_schema();
    let definitions = &schema["$defs"];
    let mut text = format!("# Pipeline file\n\n{GENERATED}");
    paragraph(
        &mut text,
        "[`full.yaml`](../../pipelines/full.yaml) has every key at its default. `fhirlake validate FILE` reports what \
            is wrong \
         with a file, with line and column.",
    );
    paragraph(
        &mut text,
        "Sizes have a unit (`16MiB`, `1GB`), spans too (`90s`, `5m`, `1h`, `7d`). `${env:NAME}`, `${file:PATH}` and \
         `${azure-key-vault:VAULT/SECRET}` are resolved in `tables`, `state`, `telemetry.otlp`, and of `source` in \
         `url`, \
         `headers`, and `client_id`, `private_key`, `client_secret`, `token_url` and `bearer_token` of `auth`. \
         Elsewhere they \
         are an error.",
    );
    keys(&mut text, &schema, definitions);
    for (name, section) in
        definitions.as_object().unwrap().iter().filter(|(_, section)| section["properties"].is_object())
    {
        text.push_str(&format!("## {name}\n\n"));
        paragraph(&mut text, section["description"].as_str().unwrap_or_default());
        keys(&mut text, section, definitions);
    }
    let choices: Vec<_> =
        definitions.as_object().unwrap().iter().filter(|(_, section)| section["oneOf"].is_array()).collect();
    text.push_str("## Choices\n\n");
    for (name, section) in choices {
        paragraph(&mut text, &format!("**{name}**: {}", section["description"].as_str().unwrap_or_default()));
        for choice in section["oneOf"].as_array().unwrap().iter().filter(|choice| choice["const"].is_string()) {
            let what = one_line(choice["description"].as_str().unwrap_or_default());
            item(&mut text, &format!("`{}`: {what}", choice["const"].as_str().unwrap()));
        }
        text.push('\n');
    }
    hold(&docs("reference/pipeline-file.md"), &format!("{}\n", text.trim_end()));
}

// Breaks if a member of the report is added that its reference does not name.
#[test]
fn the_report_is_the_structs() {
    let schema = schemars::schema_for!(fhirlake::topology::RunReport).to_value();
    let definitions = &schema["$defs"];
    let mut text = format!("# Run report\n\n{GENERATED}");
    paragraph(
        &mut text,
        "`fhirlake run --json` prints it, and `<state>/runs/<run>.json` keeps it. Members that are empty are left out.",
    );
    keys(&mut text, &schema, definitions);
    text.push_str("## TypeOutcome\n\nWhat happened to a type.\n\n");
    keys(&mut text, &definitions["TypeOutcome"], definitions);
    hold(&docs("reference/report.md"), &format!("{}\n", text.trim_end()));
}

// Breaks if a metric is added that the reference does not name.
#[test]
fn the_reference_names_every_metric() {
    let mut text = format!(
        "# Metrics\n\n{GENERATED}Names and units follow OpenTelemetry's conventions. `/metrics` has them as \
            Prometheus writes them.\n\
         Counters count from the start of the process. All but those of the process have the label\n`pipeline`.\n\n"
    );
    for metric in METRICS {
        let label = metric.label.map(|label| format!(", label `{}`", label.replace(", ", "`, `"))).unwrap_or_default();
        item(
            &mut text,
            &format!("**`{}`** (`{}`, {}{label}): {}", metric.name, metric.prometheus(), metric.unit, metric.what),
        );
    }
    hold(&docs("reference/metrics.md"), &text);
}

// Breaks if a kind of error is added whose exit code is not documented.
#[test]
fn the_reference_names_every_exit_code() {
    use fhirlake::error::{Advice, ErrorKind};
    let mut text = format!(
        "# Exit codes\n\n{GENERATED}A scheduler may run the command again after a code that is marked so.\n\n* **0**: \
            success.\n"
    );
    let mut kinds = ErrorKind::ALL;
    kinds.sort_by_key(|kind| kind.exit_code());
    for kind in kinds {
        let retry = if kind.may_retry() { ", run again" } else { "" };
        let name = format!("{kind:?}").to_lowercase();
        item(&mut text, &format!("**{}** ({name}{retry}): {}.", kind.exit_code(), kind.advice()));
    }
    hold(&docs("reference/exit-codes.md"), &text);
}

/// The help of a command, as the program prints it.
fn help(command: &[&str]) -> String {
    let run = std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake")).args(command).arg("--help").output().unwrap();
    assert!(run.status.success(), "{command:?}");
    String::from_utf8(run.stdout).unwrap()
}

/// The commands that a help text lists, by what each does: lines with two blanks before the name.
fn commands(help: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut listing = false;
    for line in help.lines() {
        match line.strip_prefix("  ") {
            Some(rest) if listing && rest.starts_with(|letter: char| letter.is_ascii_lowercase()) => {
                found.extend(rest.split_whitespace().next().map(str::to_owned));
            }
            Some(_) => {}
            None => listing = ["Run:", "Inspect:", "Maintain:", "Tools:", "Commands:"].contains(&line),
        }
    }
    found
}

// The reference of the command line, from the program's own help; and each command says how it is used.
#[test]
fn the_reference_is_the_help() {
    let whole = help(&[]);
    let mut text = format!("# Command line\n\n{GENERATED}```text\n{}\n```\n", whole.trim_end());
    let names = commands(&whole);
    assert!(names.len() >= 18, "{names:?}");
    for name in &names {
        let of_command = help(&[name]);
        let mut all = vec![(name.clone(), of_command.clone())];
        for sub in commands(&of_command) {
            all.push((format!("{name} {sub}"), help(&[name, &sub])));
        }
        for (name, help) in all {
            assert!(help.contains("\nExamples:\n  fhirlake "), "{name} has no examples");
            text.push_str(&format!("\n## fhirlake {name}\n\n```text\n{}\n```\n", help.trim_end()));
        }
    }
    hold(&docs("reference/cli.md"), &text);
}

// The diagrams are drawn from the stages.
#[test]
fn the_diagrams_are_the_topology() {
    let topology = fhirlake::topology::Topology::new(&Default::default(), &fhirlake::stages::Memory::new(512 << 20));
    let diagram = topology.diagram();
    assert!(diagram.lines().all(|line| line.chars().count() <= 100), "{diagram}");
    for name in ["../README.md", "explanation/architecture.md"] {
        let path = docs(name);
        let committed = std::fs::read_to_string(&path).unwrap();
        let (before, rest) = committed.split_once("<!-- diagram -->\n").unwrap();
        let (_, after) = rest.split_once("<!-- end of diagram -->\n").unwrap();
        hold(&path, &format!("{before}<!-- diagram -->\n```text\n{diagram}```\n<!-- end of diagram -->\n{after}"));
    }
}

// Breaks if a share of `memory:` is another than the documents say.
#[test]
fn the_shares_are_those_of_the_stages() {
    let topology = fhirlake::topology::Topology::new(&Default::default(), &fhirlake::stages::Memory::new(512 << 20));
    let mut list = String::new();
    for (name, percent) in topology.shares() {
        list.push_str(&format!("* `{name}` {percent} %\n"));
    }
    let path = docs("explanation/memory.md");
    let committed = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = committed.split_once("<!-- shares -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- end of shares -->\n").unwrap();
    hold(&path, &format!("{before}<!-- shares -->\n{list}<!-- end of shares -->\n{after}"));
}

/// The Markdown files of the project.
fn pages() -> Vec<PathBuf> {
    fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|ext| ext == "md") {
                out.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut out: Vec<PathBuf> =
        ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"].map(|name| root.join(name)).into();
    walk(&root.join("docs"), &mut out);
    walk(&root.join("crates"), &mut out);
    out
}

/// The anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = kept.chars().filter(|letter| letter.is_alphanumeric() || [' ', '-', '_'].contains(letter));
    kept.map(|letter| if letter == ' ' { '-' } else { letter }).collect()
}

// Breaks if a link leads nowhere, or if a line is longer than a person reads.
#[test]
fn links_lead_somewhere_and_lines_are_short() {
    let mut wrong = Vec::new();
    for page in pages() {
        let text = std::fs::read_to_string(&page).unwrap();
        let mut fenced = false;
        for (number, line) in text.lines().enumerate() {
            fenced ^= line.trim_start().starts_with("```");
            let is_prose = !fenced && !line.starts_with(['|', '<', '!']) && !line.contains("](");
            if is_prose && line.chars().count() > 100 && page.file_name().unwrap() != "licenses.md" {
                wrong.push(format!("{}:{}: {} columns", page.display(), number + 1, line.chars().count()));
            }
        }
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            if link.contains("://") || link.contains(char::is_whitespace) || path.is_empty() && heading.is_empty() {
                continue;
            }
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            if !target.exists() {
                wrong.push(format!("{}: {link}", page.display()));
            } else if !heading.is_empty() {
                let text = std::fs::read_to_string(&target).unwrap();
                if !text.lines().any(|line| line.starts_with('#') && anchor(line) == heading) {
                    wrong.push(format!("{}: {link}: no such heading", page.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let summary = std::fs::read_to_string(docs("SUMMARY.md")).unwrap();
    let root = docs("");
    for page in pages()
        .iter()
        .filter_map(|page| page.strip_prefix(&root).ok())
        .filter(|page| page.to_str() != Some("SUMMARY.md"))
    {
        assert!(summary.contains(&format!("({})", page.display())), "SUMMARY.md does not list {}", page.display());
    }
}

// Breaks if an alert or the dashboard asks for a metric that there is not.
#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    let known: Vec<String> = METRICS.iter().map(fhirlake::telemetry::Metric::prometheus).collect();
    for name in ["alerts.yaml", "grafana.json"] {
        let text = std::fs::read_to_string(docs(name)).unwrap();
        let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        let named: Vec<&str> =
            words.filter(|word| word.starts_with("fhirlake_") || word.starts_with("process_")).collect();
        assert!(named.len() >= 8, "{name}");
        for word in named {
            assert!(known.iter().any(|metric| metric == word), "{name} asks for {word}");
        }
    }
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(docs("grafana.json")).unwrap()).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().iter().all(|panel| panel["targets"][0]["expr"].is_string()));
    let alerts: Value = serde_saphyr::from_str(&std::fs::read_to_string(docs("alerts.yaml")).unwrap()).unwrap();
    let guide = std::fs::read_to_string(docs("how-to/alerts.md")).unwrap();
    for rule in alerts["groups"][0]["rules"].as_array().unwrap() {
        let name = rule["alert"].as_str().unwrap();
        assert!(guide.contains(&format!("\n## {name}\n")), "the guide does not say what to do about {name}");
    }
}

// What is deployed is what there is: pipeline files in the manifests are valid, and commands are fhirlake's.
#[test]
fn what_is_deployed_can_be_read() {
    let deploy = docs("deploy");
    let read = |name: &str| std::fs::read_to_string(deploy.join(name)).unwrap();
    let documents = |name: &str| -> Vec<Value> {
        let text = read(name);
        text.split("\n---\n").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
    };
    let all = documents("kubernetes-deployment.yaml");
    let config = all.iter().find(|document| document["kind"] == "ConfigMap").unwrap();
    let file = fhirlake::config::read_pipeline(config["data"]["pipeline.yaml"].as_str().unwrap(), &[]).unwrap().file;
    assert_eq!(file.schedule.len(), 2);
    let container = |pod: &Value| pod["spec"]["containers"][0].clone();
    let deployment = all.iter().find(|document| document["kind"] == "Deployment").unwrap();
    let job = &documents("kubernetes-cronjob.yaml")[0];
    for container in
        [container(&deployment["spec"]["template"]), container(&job["spec"]["jobTemplate"]["spec"]["template"])]
    {
        let arguments: Vec<&str> =
            container["args"].as_array().unwrap().iter().map(|argument| argument.as_str().unwrap()).collect();
        // `--help` behind them: the arguments are parsed, and nothing is done.
        let run =
            std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake")).args(&arguments).arg("--help").output().unwrap();
        assert!(run.status.success(), "{arguments:?}");
        assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
        assert!(container["volumeMounts"].as_array().unwrap().iter().any(|mount| mount["mountPath"] == "/lake"));
    }
    for (name, command) in [
        ("fhirlake.service", "fhirlake serve"),
        ("fhirlake-run.service", "fhirlake run"),
        ("crontab", "fhirlake run"),
        ("airflow_dag.py", "run \"$PIPELINE\""),
    ] {
        assert!(read(name).contains(command), "{name}");
    }
}
