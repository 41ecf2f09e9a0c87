//! Documents that are written from the code: the reference of the pipeline file, and the table of metrics.
//! `FHIRLAKE_UPDATE=1` writes them anew.

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
    let of = |value: &Value| value.get("$ref").and_then(Value::as_str).map(|text| text.rsplit('/').next().unwrap().to_owned());
    let direct = of(property).or_else(|| property["anyOf"].as_array()?.iter().find_map(of)).or_else(|| of(&property["items"]));
    direct.map(|name| -> &str { Box::leak(name.into_boxed_str()) })
}

fn kind(property: &Value, definitions: &Value) -> String {
    let is_section = |name: &str| definitions[name]["properties"].is_object();
    if let Some(name) = named(property) {
        let list = property["type"] == "array";
        if is_section(name) {
            return format!("{}[{name}](#{})", if list { "list of " } else { "" }, name.to_lowercase());
        }
        let choices = definitions[name]["oneOf"].as_array().into_iter().flatten().filter_map(|choice| choice["const"].as_str());
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

fn rows(out: &mut String, section: &Value, definitions: &Value) {
    out.push_str("| key | value | default | |\n|---|---|---|---|\n");
    let required: Vec<&str> = section["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (key, property) in section["properties"].as_object().unwrap() {
        let what = property["description"].as_str().map(str::to_owned);
        let what = what.or_else(|| definitions[named(property)?]["description"].as_str().map(str::to_owned)).unwrap_or_default();
        let default = match &property["default"] {
            _ if required.contains(&key.as_str()) => "required".to_owned(),
            Value::Null => String::new(),
            Value::Object(_) => "its own".to_owned(),
            value => format!("`{value}`"),
        };
        out.push_str(&format!("| `{key}` | {} | {} | {} |\n", kind(property, definitions), one_line(&default), one_line(&what)));
    }
    out.push('\n');
}

// The reference of the pipeline file, from the structs that it is read into.
#[test]
fn the_reference_is_the_structs() {
    let schema = pipeline_json_schema();
    let definitions = &schema["$defs"];
    let mut text = "# The pipeline file\n\nWritten from the structs that the file is read into. [`full.yaml`](../pipelines/full.yaml) has every key at its default; \
                    `fhirlake validate FILE` says what is wrong with one, with line and column.\n\nSizes have a unit (`16MiB`, `1GB`), spans too (`90s`, `5m`, `1h`, `7d`). \
                    `${env:NAME}`, `${file:PATH}` and `${azure-key-vault:VAULT/SECRET}` are read in `tables`, `state`, `telemetry.otlp`, and of `source` in `url`, `headers`, and `client_id`, `private_key`, `client_secret`, `token_url` and `bearer_token` of `auth`; elsewhere they are an error.\n\n"
        .to_owned();
    rows(&mut text, &schema, definitions);
    for (name, section) in definitions.as_object().unwrap().iter().filter(|(_, section)| section["properties"].is_object()) {
        text.push_str(&format!("## {name}\n\n{}\n\n", one_line(section["description"].as_str().unwrap_or_default())));
        rows(&mut text, section, definitions);
    }
    let choices: Vec<_> = definitions.as_object().unwrap().iter().filter(|(_, section)| section["oneOf"].is_array()).collect();
    text.push_str("## Choices\n\n");
    for (name, section) in choices {
        text.push_str(&format!("**{name}**: {}\n\n", one_line(section["description"].as_str().unwrap_or_default())));
        for choice in section["oneOf"].as_array().unwrap().iter().filter(|choice| choice["const"].is_string()) {
            let what = one_line(choice["description"].as_str().unwrap_or_default());
            text.push_str(&format!("* `{}`: {what}\n", choice["const"].as_str().unwrap()));
        }
        text.push('\n');
    }
    hold(&docs("pipeline-file.md"), &text);
}

// Breaks if a metric is added that the README does not name.
#[test]
fn the_readme_names_every_metric() {
    let path = docs("../README.md");
    let committed = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = committed.split_once("<!-- metrics -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- end of metrics -->\n").unwrap();
    let mut text = format!("{before}<!-- metrics -->\n| metric | in `/metrics` | unit | label | |\n|---|---|---|---|---|\n");
    for metric in METRICS {
        let label = metric.label.map(|label| format!("`{}`", label.replace(", ", "`, `"))).unwrap_or_default();
        text.push_str(&format!(
            "| `{}` | `{}` | {} | {label} | {} |\n",
            metric.name,
            metric.prometheus(),
            metric.unit,
            metric.what
        ));
    }
    text.push_str(&format!("<!-- end of metrics -->\n{after}"));
    hold(&path, &text);
}

// Breaks if an alert or the dashboard asks for a metric that there is not.
#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    let known: Vec<String> = METRICS.iter().map(fhirlake::telemetry::Metric::prometheus).collect();
    for name in ["alerts.yaml", "grafana.json"] {
        let text = std::fs::read_to_string(docs(name)).unwrap();
        let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        let named: Vec<&str> = words.filter(|word| word.starts_with("fhirlake_") || word.starts_with("process_")).collect();
        assert!(named.len() >= 8, "{name}");
        for word in named {
            assert!(known.iter().any(|metric| metric == word), "{name} asks for {word}");
        }
    }
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(docs("grafana.json")).unwrap()).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().iter().all(|panel| panel["targets"][0]["expr"].is_string()));
    let alerts: Value = serde_saphyr::from_str(&std::fs::read_to_string(docs("alerts.yaml")).unwrap()).unwrap();
    let guide = std::fs::read_to_string(docs("operating.md")).unwrap();
    for rule in alerts["groups"][0]["rules"].as_array().unwrap() {
        let name = rule["alert"].as_str().unwrap();
        assert!(guide.contains(&format!("| {name} |")), "the guide does not say what to do about {name}");
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
    for container in [container(&deployment["spec"]["template"]), container(&job["spec"]["jobTemplate"]["spec"]["template"])] {
        let arguments: Vec<&str> =
            container["args"].as_array().unwrap().iter().map(|argument| argument.as_str().unwrap()).collect();
        // `--help` behind them: the arguments are parsed, and nothing is done.
        let run = std::process::Command::new(env!("CARGO_BIN_EXE_fhirlake")).args(&arguments).arg("--help").output().unwrap();
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
