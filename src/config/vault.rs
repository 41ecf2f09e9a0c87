//! Secrets out of an Azure Key Vault: `${azure-key-vault:VAULT/SECRET}`. `VAULT` is its name or its host; the newest
//! version counts.
//!
//! Authentication to the vault is found as Azure's other tools find it: a client secret or a federated token that the
//! environment names, else the machine's managed identity, else (at a developer's desk) the `az` command.

use std::sync::Arc;
use std::time::Duration;

use azure_core::credentials::{Secret, TokenCredential};
use azure_identity::{
    ClientSecretCredential, DeveloperToolsCredential, ManagedIdentityCredential, WorkloadIdentityCredential,
};
use azure_security_keyvault_secrets::{SecretClient, SecretClientOptions};

use crate::values::environment;

/// Time for which a vault may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The secret that `reference` (`VAULT/SECRET`) names. Errors name the reference, never a value.
pub(crate) fn secret(reference: &str) -> Result<String, String> {
    let (vault, name) = reference
        .split_once('/')
        .filter(|(vault, name)| !vault.is_empty() && !name.is_empty())
        .ok_or_else(|| "not VAULT/SECRET".to_owned())?;
    let host = if vault.contains('.') { vault.to_owned() } else { format!("{vault}.vault.azure.net") };
    let failed = |why: String| format!("the secret {name} of the vault {vault} cannot be had: {why}");
    let credential = credential().map_err(|error| failed(error.to_string()))?;
    ask(&format!("https://{host}"), name, credential, SecretClientOptions::default()).map_err(failed)
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

/// An error and what it comes from.
fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

/// Asks on a thread of its own: files are read where a reactor may be running already, and where none is.
fn ask(
    url: &str,
    name: &str,
    credential: Arc<dyn TokenCredential>,
    options: SecretClientOptions,
) -> Result<String, String> {
    let work = async {
        let client = SecretClient::new(url, credential, Some(options)).map_err(|error| said(&error))?;
        let answer = client.get_secret(name, None).await.map_err(|error| said(&error))?;
        let secret = answer.into_model().map_err(|error| said(&error))?;
        secret.value.ok_or_else(|| "it has no value".to_owned())
    };
    std::thread::scope(|scope| {
        let requested = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| error.to_string())?;
            let answer = runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await });
            answer.unwrap_or_else(|_| Err(format!("no answer within {} s", PATIENCE.as_secs())))
        });
        requested.join().unwrap_or_else(|_| Err("the request ended abnormally".to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use azure_core::credentials::{AccessToken, TokenRequestOptions};
    use azure_core::http::headers::Headers;
    use azure_core::http::{AsyncRawResponse, ClientOptions, HttpClient, Request, StatusCode, Transport};

    use super::*;

    #[derive(Debug)]
    struct Known;

    #[async_trait::async_trait]
    impl TokenCredential for Known {
        async fn get_token(
            &self,
            scopes: &[&str],
            _: Option<TokenRequestOptions<'_>>,
        ) -> azure_core::Result<AccessToken> {
            assert_eq!(scopes, ["https://vault.azure.net/.default"]);
            let expires = azure_core::time::OffsetDateTime::now_utc() + std::time::Duration::from_secs(3600);
            Ok(AccessToken::new("the-token", expires))
        }
    }

    /// Answers as a vault does: 401 with a challenge, then the secret for whoever brings the token.
    #[derive(Debug, Default)]
    struct StandIn(Mutex<Vec<(String, bool)>>);

    #[async_trait::async_trait]
    impl HttpClient for StandIn {
        async fn execute_request(&self, request: &Request) -> azure_core::Result<AsyncRawResponse> {
            let token = request
                .headers()
                .iter()
                .any(|(name, value)| name.as_str() == "authorization" && value.as_str() == "Bearer the-token");
            self.0.lock().push((request.url().to_string(), token));
            let mut headers = Headers::new();
            headers.insert("content-type", "application/json");
            let (code, body) = match (token, request.url().path()) {
                (false, _) => {
                    let challenge =
                        "Bearer authorization=\"https://login.example/tenant\", resource=\"https://vault.azure.net\"";
                    headers.insert("www-authenticate", challenge);
                    (StatusCode::Unauthorized, "{}")
                }
                (true, path) if path.starts_with("/secrets/fhir-client-id") => (
                    StatusCode::Ok,
                    "{\"value\":\"me\",\"id\":\"https://test.vault.azure.net/secrets/fhir-client-id/1\"}",
                ),
                (true, _) => {
                    (StatusCode::NotFound, "{\"error\":{\"code\":\"SecretNotFound\",\"message\":\"no such secret\"}}")
                }
            };
            Ok(AsyncRawResponse::from_bytes(code, headers, body.as_bytes().to_vec()))
        }
    }

    // Breaks if the token is sent before the vault says what it is for, or a secret that is not there is taken for an
    // empty one.
    #[test]
    fn a_secret_is_asked_for_with_the_token_that_the_vault_wants() {
        let vault = Arc::new(StandIn::default());
        let options = || SecretClientOptions {
            client_options: ClientOptions {
                transport: Some(Transport::new(vault.clone())),
                ..ClientOptions::default()
            },
            ..SecretClientOptions::default()
        };
        let url = "https://test.vault.azure.net";
        assert_eq!(ask(url, "fhir-client-id", Arc::new(Known), options()).unwrap(), "me");
        let error = ask(url, "missing", Arc::new(Known), options()).unwrap_err();
        assert_eq!(error, "no such secret", "the vault's own words");
        let seen = vault.0.lock().clone();
        assert!(seen[0].0.contains("/secrets/fhir-client-id") && seen[0].0.contains("api-version="), "{seen:?}");
        assert_eq!((seen[0].1, seen[1].1), (false, true), "the token goes when it is asked for: {seen:?}");
    }

    #[test]
    fn what_is_no_reference_says_so() {
        for wrong in ["vault", "/secret", "vault/"] {
            assert!(secret(wrong).unwrap_err().contains("VAULT/SECRET"));
        }
    }
}
