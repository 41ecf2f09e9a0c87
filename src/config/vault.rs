//! Secrets out of an Azure Key Vault: `${azure-key-vault:VAULT/SECRET}`. `VAULT` is its name or its host; the newest version counts.
//!
//! Who we are to the vault is found as Azure's other tools find it: a client secret or a federated token that the environment
//! names, else the machine's managed identity, else (at a developer's desk) the `az` command.

use std::sync::Arc;
use std::time::Duration;

use azure_core::credentials::{Secret, TokenCredential};
use azure_identity::{ClientSecretCredential, DeveloperToolsCredential, ManagedIdentityCredential, WorkloadIdentityCredential};
use azure_security_keyvault_secrets::{SecretClient, SecretClientOptions};

use super::values::environment;

/// How long a vault may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The secret that `reference` (`VAULT/SECRET`) names. Errors name the reference, never a value.
pub(super) fn secret(reference: &str) -> Result<String, String> {
    let (vault, name) = reference
        .split_once('/')
        .filter(|(vault, name)| !vault.is_empty() && !name.is_empty())
        .ok_or_else(|| "not VAULT/SECRET".to_owned())?;
    let host = if vault.contains('.') { vault.to_owned() } else { format!("{vault}.vault.azure.net") };
    let failed = |why: String| format!("the secret {name} of the vault {vault} cannot be had: {why}");
    let credential = credential().map_err(|error| failed(error.to_string()))?;
    ask(&format!("https://{host}"), name, credential, true).map_err(failed)
}

fn credential() -> azure_core::Result<Arc<dyn TokenCredential>> {
    let said = |name: &str| environment(name).filter(|value| !value.is_empty());
    if let (Some(tenant), Some(client), Some(secret)) =
        (said("AZURE_TENANT_ID"), said("AZURE_CLIENT_ID"), said("AZURE_CLIENT_SECRET"))
    {
        return Ok(ClientSecretCredential::new(&tenant, client, Secret::new(secret), None)?);
    }
    if said("AZURE_FEDERATED_TOKEN_FILE").is_some() {
        return Ok(WorkloadIdentityCredential::new(None)?);
    }
    if said("IDENTITY_ENDPOINT").is_some() || said("MSI_ENDPOINT").is_some() || said("AZURE_CLIENT_ID").is_some() {
        return Ok(ManagedIdentityCredential::new(None)?);
    }
    match DeveloperToolsCredential::new(None) {
        Ok(credential) => Ok(credential),
        Err(_) => Ok(ManagedIdentityCredential::new(None)?),
    }
}

/// Asks on a thread of its own: files are read where a reactor may be running already, and where none is. `verify`: the token
/// goes only to who is of the domain that it is for.
fn ask(url: &str, name: &str, credential: Arc<dyn TokenCredential>, verify: bool) -> Result<String, String> {
    let work = async {
        let options = SecretClientOptions { verify_challenge_resource: Some(verify), ..SecretClientOptions::default() };
        let client = SecretClient::new(url, credential, Some(options)).map_err(|error| error.to_string())?;
        let answer = client.get_secret(name, None).await.map_err(|error| error.to_string())?;
        let secret = answer.into_model().map_err(|error| error.to_string())?;
        secret.value.ok_or_else(|| "it has no value".to_owned())
    };
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
            let answer = runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await });
            answer.unwrap_or_else(|_| Err(format!("no answer within {} s", PATIENCE.as_secs())))
        });
        asked.join().unwrap_or_else(|_| Err("the request ended abnormally".to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    use azure_core::credentials::{AccessToken, TokenRequestOptions};

    use super::*;

    #[derive(Debug)]
    struct Known;

    #[async_trait::async_trait]
    impl TokenCredential for Known {
        async fn get_token(&self, scopes: &[&str], _: Option<TokenRequestOptions<'_>>) -> azure_core::Result<AccessToken> {
            assert_eq!(scopes, ["https://vault.azure.net/.default"]);
            let expires = azure_core::time::OffsetDateTime::now_utc() + std::time::Duration::from_secs(3600);
            Ok(AccessToken::new("the-token", expires))
        }
    }

    // A stand-in as the real one answers: first 401 with a challenge, then the secret for whoever brings the token.
    #[test]
    fn a_secret_is_asked_for_with_the_token_that_the_vault_wants() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let answers = std::thread::spawn(move || {
            let mut seen = Vec::new();
            while seen.len() < 3 {
                let (stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut stream = stream;
                loop {
                    let mut head = Vec::new();
                    for line in reader.by_ref().lines() {
                        let line = line.unwrap_or_default();
                        if line.is_empty() {
                            break;
                        }
                        head.push(line);
                    }
                    let Some(first) = head.first().cloned() else { break };
                    let token = head.iter().any(|line| line.eq_ignore_ascii_case("authorization: Bearer the-token"));
                    seen.push((first.clone(), token));
                    let (code, more, body) = match (token, first.contains("/secrets/fhir-client-id")) {
                        (false, _) => (
                            "401 Unauthorized",
                            "WWW-Authenticate: Bearer authorization=\"https://login.example/tenant\", resource=\"https://vault.azure.net\"\r\n",
                            "{}",
                        ),
                        (true, true) => ("200 OK", "", "{\"value\":\"me\",\"id\":\"https://v/secrets/fhir-client-id/1\"}"),
                        (true, false) => {
                            ("404 Not Found", "", "{\"error\":{\"code\":\"SecretNotFound\",\"message\":\"no such secret\"}}")
                        }
                    };
                    write!(
                        stream,
                        "HTTP/1.1 {code}\r\ncontent-type: application/json\r\n{more}content-length: {}\r\n\r\n{body}",
                        body.len()
                    )
                    .unwrap();
                    if seen.len() >= 3 {
                        break;
                    }
                }
            }
            seen
        });
        use std::io::Read;
        let url = format!("http://{address}");
        assert_eq!(ask(&url, "fhir-client-id", Arc::new(Known), false).unwrap(), "me");
        let error = ask(&url, "missing", Arc::new(Known), false).unwrap_err();
        assert!(error.contains("404") || error.contains("SecretNotFound"), "{error}");
        let seen = answers.join().unwrap();
        assert!(seen[0].0.starts_with("GET /secrets/fhir-client-id") && seen[0].0.contains("api-version="), "{seen:?}");
        assert!(seen[1].1, "the second one brings the token: {seen:?}");
    }

    #[test]
    fn what_is_no_reference_says_so() {
        for wrong in ["vault", "/secret", "vault/"] {
            assert!(secret(wrong).unwrap_err().contains("VAULT/SECRET"));
        }
    }
}
