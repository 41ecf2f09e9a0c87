//! Certificates: the server's, ours, and what is said of those that are wrong.
#![expect(clippy::disallowed_methods, reason = "servers of the tests' own")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fhirlake::error::{Advice, ErrorKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion, version};

use super::support::{Lake, lake};

fn key(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/keys/tls").join(name)
}

/// What a server answers to a request of `path`, by itself on `port`.
fn answer(path: &str, port: u16) -> String {
    let (status, headers, body) = match path {
        path if path.starts_with("/plain/$export") => {
            ("202 ExportHandle", format!("Content-Location: http://localhost:{port}/status\r\n"), String::new())
        }
        path if path.starts_with("/fhir/$export") => {
            ("202 ExportHandle", format!("Content-Location: https://localhost:{port}/status\r\n"), String::new())
        }
        "/status" => (
            "200 OK",
            "Content-Type: application/json\r\n".to_owned(),
            r#"{"transactionTime":"2026-01-01T00:00:00Z","request":"x","requiresAccessToken":false,"output":[{"type":"Patient","url":"/p"}],"error":[]}"#.to_owned(),
        ),
        _ => ("200 OK", String::new(), "{\"resourceType\":\"Patient\",\"id\":\"a\"}\n".to_owned()),
    };
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

/// An export server with a certificate, which may want one of its clients; its port.
async fn server(certificate: &str, wants_client: bool, versions: &[&'static SupportedProtocolVersion]) -> u16 {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(key(certificate)).unwrap().map(Result::unwrap).collect();
    let private = PrivateKeyDer::from_pem_file(key(certificate)).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions).unwrap();
    let builder = match wants_client {
        true => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(key("ca.pem")).unwrap()).unwrap();
            builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap(),
            )
        }
        false => builder.with_no_client_auth(),
    };
    let acceptor = TlsAcceptor::from(Arc::new(builder.with_single_cert(certificates, private).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(connection).await else { return };
                let mut request = Vec::new();
                while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                    match stream.read_buf(&mut request).await {
                        Ok(1..) => {}
                        _ => return,
                    }
                }
                let text = String::from_utf8_lossy(&request);
                let path = text.split(' ').nth(1).unwrap_or_default();
                let _ = stream.write_all(answer(path, port).as_bytes()).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    port
}

fn source(host: &str, port: u16, tls: &str) -> String {
    format!("{{ url: \"https://{host}:{port}/fhir\", types: [Patient], retry_for: 1m, max_poll_interval: 1s{tls} }}")
}

fn ca() -> String {
    format!("ca_file: \"{}\"", key("ca.pem").display())
}

/// Fails at once with these words, and a hint with those.
async fn fails(lake: &Lake, source: &str, words: &str, hint: &str) {
    let begun = Instant::now();
    let error = lake.run(source, "").await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(20), "{error}: it was tried again");
    assert_eq!(error.kind(), ErrorKind::Network, "{error}");
    assert!(error.to_string().contains(words), "`{words}` is not in: {error}");
    assert!(error.advice().contains(hint), "`{hint}` is not in: {}", error.advice());
}

// Breaks if what stays until somebody changes a certificate is tried again, or the message does not say which and what
// to set.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_are_wrong_fail_at_once() {
    let (lake, trusted) = (lake(), format!(", tls: {{ {} }}", ca()));
    let good = server("server.pem", false, &[&version::TLS13]).await;
    fails(&lake, &source("localhost", good, ""), "not trusted", "source.tls.ca_file").await;
    let expired = server("expired.pem", false, &[&version::TLS13]).await;
    fails(&lake, &source("localhost", expired, &trusted), "expired", "renew").await;
    let name = server("name.pem", false, &[&version::TLS12]).await;
    fails(&lake, &source("localhost", name, &trusted), "ehr.example", "name").await;
    for versions in [&[&version::TLS12], &[&version::TLS13]] {
        let port = server("server.pem", true, versions).await;
        fails(&lake, &source("localhost", port, &trusted), "client certificate", "source.tls.client_certificate").await;
    }
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = plain.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = plain.accept().await {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
        }
    });
    fails(&lake, &source("localhost", port, ""), "does not speak TLS", "port").await;
}

// Breaks if a CA or a client certificate that the file names is not used, however it is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_ca_and_a_client_certificate_of_the_pipeline_file_are_used() {
    let both = format!("client_certificate: \"{}\"", key("client.pem").display());
    let apart = format!(
        "client_certificate: \"{}\", client_key: \"${{file:{}}}\"",
        key("client-only.pem").display(),
        key("client.key").display()
    );
    for versions in [&[&version::TLS12], &[&version::TLS13]] {
        for (wants_client, more) in [(false, ""), (true, both.as_str()), (true, &apart)] {
            let lake = lake();
            let port = server("server.pem", wants_client, versions).await;
            let host = if wants_client { "localhost" } else { "127.0.0.1" };
            let report = lake.run(&source(host, port, &format!(", tls: {{ {}, {more} }}", ca())), "").await.unwrap();
            assert!(report.succeeded && report.types["Patient"].inserted == 1, "{report:#?}");
        }
    }
}

fn run(lake: &Lake, source: &str, environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
    for name in
        ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"]
    {
        command.env_remove(name);
    }
    let file = lake.pipeline_file(source);
    let output = command.envs(environment.iter().copied()).arg("run").arg(file).output().unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout),
    )
}

// Breaks if the environment's CA, proxy or the hosts without one are not what counts.
#[tokio::test(flavor = "multi_thread")]
async fn the_environment_names_cas_and_proxies() {
    let port = server("server.pem", false, &[&version::TLS13]).await;
    let here = format!("https://localhost:{port}/fhir");
    let source = source("localhost", port, "");
    let authorities = key("ca.pem");
    let trusted = ("SSL_CERT_FILE", authorities.to_str().unwrap());
    assert_eq!(run(&lake(), &source, &[trusted]).0, Some(0));
    // Nothing listens where the proxy is said to be: who asks it fails.
    let proxy = ("HTTPS_PROXY", "http://127.0.0.1:9");
    let short = source.replace("retry_for: 1m", "retry_for: 0s");
    let (code, said) = run(&lake(), &short, &[trusted, proxy]);
    assert_eq!(code, Some(3), "{here} was reached without its proxy: {said}");
    for hosts in ["localhost", "*", "ehr.example, *"] {
        let (code, said) = run(&lake(), &short, &[trusted, proxy, ("NO_PROXY", hosts)]);
        assert_eq!(code, Some(0), "{hosts}: {said}");
    }
    let by_address = short.replace("localhost", "127.0.0.1");
    assert_eq!(run(&lake(), &by_address, &[trusted, proxy, ("no_proxy", "*")]).0, Some(0), "an address is a host too");
}

// Breaks if a certificate that cannot be read is found out when the night's run begins, or the message does not say
// what to do.
#[test]
fn certificates_are_read_before_anything_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name).display().to_string()
    };
    let (empty, server) = (put("empty.pem", ""), key("server.pem").display().to_string());
    let encrypted = put(
        "encrypted.pem",
        &std::fs::read_to_string(key("client-only.pem")).unwrap().replace(
            "-----END CERTIFICATE-----\n",
            "-----END CERTIFICATE-----\n-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE \
                KEY-----\n",
        ),
    );
    let (client, other) =
        (key("client-only.pem").display().to_string(), put("other.pem", &std::fs::read_to_string(&server).unwrap()));
    // A file may come back by itself; what is wrong in it does not.
    let cases = [
        (6, "ca_file: /nowhere/ca.pem".to_owned(), "/nowhere/ca.pem cannot be read"),
        (2, format!("ca_file: \"{empty}\""), "no certificate in it"),
        (2, format!("client_certificate: \"{client}\""), "no private key in it"),
        (2, format!("client_certificate: \"{encrypted}\""), "openssl pkey"),
        (2, format!("client_certificate: \"{client}\", client_key: \"{other}\""), "do not belong together"),
        (2, "client_key: \"${env:NO_SUCH_KEY}\"".to_owned(), "a key without its certificate"),
    ];
    for (expected, tls, words) in cases {
        let lake = lake();
        let (code, said) = run(&lake, &source("localhost", 9, &format!(", tls: {{ {tls} }}")), &[]);
        assert_eq!(code, Some(expected), "{tls}: {said}");
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
}

// Breaks if a server that does not know of the TLS before it leads us to a port that speaks no HTTP, and nothing says
// so.
#[tokio::test(flavor = "multi_thread")]
async fn plain_links_of_a_tls_server_are_named() {
    let port = server("server.pem", false, &[&version::TLS13]).await;
    let tls = ca();
    let source = format!(
        "{{ url: \"https://localhost:{port}/plain\", types: [Patient], retry_for: 1s, max_poll_interval: 1s, tls: {{ {tls} }} }}"
    );
    let error = lake().run(&source, "").await.unwrap_err();
    assert!(error.to_string().contains(&format!("http://localhost:{port}/status")), "{error}");
    assert!(error.advice().contains("X-Forwarded-Proto"), "{}", error.advice());
}

// Breaks if a key that is given in another form than PEM is taken for a path, and shown.
#[test]
fn a_key_that_is_no_pem_is_not_shown() {
    let yaml = "version: 1\nname: x\nsource: \
        { url: \"https://h/fhir\", tls: { client_certificate: AAAAsecretAAAA, client_key: BBBBsecretBBBB } }\ntables: \
        /tmp/x\n";
    let read = fhirlake::config::read_pipeline(yaml, &[]).unwrap();
    let problems = fhirlake::topology::RunPlan::resolve(&read).err().unwrap();
    let text = fhirlake::config::Problem::error("x.yaml", &problems).to_string();
    assert!(text.contains("source.tls.client_key") && text.contains("neither PEM"), "{text}");
    assert!(!text.contains("secret"), "{text}");
}
