//! A server's SMART configuration (SMART App Launch 2.2, `.well-known/smart-configuration`), and the scopes that
//! follow from it.

pub(crate) mod auth;
pub(crate) mod keys;

use reqwest::header::HeaderMap;
use serde_json::Value;
use url::Url;

use crate::export::request::Level;
use crate::http::read_to_limit::{SMALL, whole};
use crate::http::{Web, shown};
use foundation::error::{Context, Error, ErrorKind, Result};

/// A server's SMART configuration.
#[derive(Debug, Clone, Default)]
pub struct SmartConfiguration {
    /// Token endpoint.
    pub token_endpoint: Option<Url>,
    /// `scopes_supported`.
    pub scopes: Vec<String>,
    /// `capabilities`.
    pub capabilities: Vec<String>,
    /// `token_endpoint_auth_methods_supported`.
    pub methods: Vec<String>,
    /// `token_endpoint_auth_signing_alg_values_supported`.
    pub algorithms: Vec<String>,
    /// Seconds by which the server's clock is ahead of ours, by the answer's `Date`.
    pub skew: i64,
}

/// Subject of scopes: which types, and whether a group is read too.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Types; empty for all.
    pub types: Vec<String>,
    /// True if the export is of a group (T14).
    pub group: bool,
}

impl Access {
    /// Returns the scopes' subject for an export of `types` at `level`.
    pub fn of(level: &Level, types: &[String]) -> Self {
        Self { types: types.to_vec(), group: matches!(level, Level::Group(_)) }
    }

    fn resource_types(&self) -> impl Iterator<Item = &str> {
        self.types.iter().map(String::as_str).chain(self.group.then_some("Group"))
    }
}

impl SmartConfiguration {
    /// T4: discovery under the FHIR base, not under the host's root.
    pub(crate) async fn discover(web: &Web) -> Result<Self> {
        let base = &web.base;
        let url = base.join(".well-known/smart-configuration").context(ErrorKind::Config, "source.url")?;
        let place = shown(&url);
        let unreachable = |error: reqwest::Error| crate::http::network(&error, "SMART discovery").at(place.clone());
        let response = web.http.get(url).header("accept", "application/json").send().await.map_err(unreachable)?;
        let status = response.status();
        if status.is_server_error() || status.as_u16() == 429 {
            return Err(Error::new(ErrorKind::Network, format!("SMART discovery: the server answered {status}")));
        }
        let skew = clock_skew(response.headers());
        let body = whole(response, SMALL, &web.stop, "SMART discovery").await?;
        let json: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let list = |name: &str| {
            let items = json.get(name).and_then(Value::as_array).into_iter().flatten();
            items.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let endpoint = json.get("token_endpoint").and_then(Value::as_str).and_then(|text| base.join(text).ok());
        if endpoint.is_none() {
            return Err(Error::new(
                ErrorKind::Auth,
                format!(
                    "the server's .well-known/smart-configuration ({status}) names no token_endpoint; set \
                        source.auth.token_url"
                ),
            ));
        }
        Ok(Self {
            token_endpoint: endpoint,
            scopes: list("scopes_supported"),
            capabilities: list("capabilities"),
            methods: list("token_endpoint_auth_methods_supported"),
            algorithms: list("token_endpoint_auth_signing_alg_values_supported"),
            skew,
        })
    }

    /// The scopes to ask for (T13, T14): what the server lists, for all types where it can, else type by type; where it
    /// lists nothing, for all types in the version of its capabilities.
    pub fn scopes_for(&self, access: &Access) -> String {
        let has = |scope: &str| self.scopes.iter().any(|listed| listed == scope);
        for all in ["system/*.rs", "system/*.read", "system/*.*", "system/*.cruds"] {
            if has(all) {
                return all.to_owned();
            }
        }
        let of_type = |name: &str| {
            let forms = [format!("system/{name}.rs"), format!("system/{name}.read"), format!("system/{name}.r")];
            forms.into_iter().find(|scope| has(scope))
        };
        if !access.types.is_empty() {
            let each: Vec<String> = access.resource_types().filter_map(of_type).collect();
            if !each.is_empty() {
                return each.join(" ");
            }
        } else {
            let readable = |scope: &&String| {
                scope.starts_with("system/") && [".rs", ".read", ".r"].iter().any(|end| scope.ends_with(end))
            };
            let each: Vec<&str> = self.scopes.iter().filter(readable).map(String::as_str).collect();
            if !each.is_empty() {
                return each.join(" ");
            }
        }
        let can = |capability: &str| self.capabilities.iter().any(|listed| listed == capability);
        if can("permission-v2") && !can("permission-v1") {
            "system/*.rs".to_owned()
        } else {
            "system/*.read".to_owned()
        }
    }
}

/// Types of `access` that `granted` scopes do not let us read; empty where all are, or where the server names none.
pub(crate) fn not_granted(granted: &str, access: &Access) -> Vec<String> {
    let reads = |permission: &str| match permission.split('?').next().unwrap_or_default() {
        "read" | "*" => true,
        letters => letters.contains('r') && letters.chars().all(|letter| "cruds".contains(letter)),
    };
    let granted = granted.split_whitespace().filter_map(|scope| scope.strip_prefix("system/")?.split_once('.'));
    let readable: Vec<&str> = granted.filter(|(_, permission)| reads(permission)).map(|(name, _)| name).collect();
    if readable.contains(&"*") {
        return Vec::new();
    }
    access.resource_types().filter(|name| !readable.contains(name)).map(str::to_owned).collect()
}

/// Seconds by which the server's clock is ahead of ours; nothing where it is hardly off, or does not say.
pub(crate) fn clock_skew(headers: &HeaderMap) -> i64 {
    let date = headers.get("date").and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
    let Some(date) = date else { return 0 };
    let seconds = |time: std::time::SystemTime| {
        time.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0))
    };
    let skew = seconds(date) - seconds(std::time::SystemTime::now());
    if skew.abs() > 5 { skew } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(scopes: &[&str], capabilities: &[&str]) -> SmartConfiguration {
        let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        SmartConfiguration { scopes: owned(scopes), capabilities: owned(capabilities), ..SmartConfiguration::default() }
    }

    #[test]
    fn t13_t14_scopes_by_what_the_server_supports() {
        let two = Access::of(&Level::System, &["Patient".into(), "Condition".into()]);
        let group = Access::of(&Level::Group("g".into()), &["Patient".into()]);
        let all = Access::default();
        let cases: [(&[&str], &[&str], &Access, &str); 9] = [
            (&[], &[], &two, "system/*.read"),
            (&[], &["permission-v1", "permission-v2"], &two, "system/*.read"),
            (&[], &["permission-v2"], &two, "system/*.rs"),
            (&["system/*.read", "openid"], &["permission-v2"], &two, "system/*.read"),
            (&["system/*.rs", "system/*.read"], &[], &all, "system/*.rs"),
            (
                &["system/Patient.read", "system/Condition.rs", "system/Claim.rs"],
                &[],
                &two,
                "system/Patient.read system/Condition.rs",
            ),
            (&["system/Patient.rs", "system/Group.rs"], &[], &group, "system/Patient.rs system/Group.rs"),
            (&["system/Patient.rs", "user/Claim.rs", "system/Claim.cud"], &[], &all, "system/Patient.rs"),
            (&["openid"], &["permission-v2"], &two, "system/*.rs"),
        ];
        for (scopes, capabilities, access, expected) in cases {
            assert_eq!(configuration(scopes, capabilities).scopes_for(access), expected, "{scopes:?} {capabilities:?}");
        }
    }

    #[test]
    fn t10_the_scope_that_is_granted_may_be_less() {
        let two = Access::of(&Level::System, &["Patient".into(), "Condition".into()]);
        for (granted, missing) in [
            ("system/*.read", vec![]),
            ("system/*.rs", vec![]),
            ("system/*.cruds openid", vec![]),
            ("system/Patient.rs", vec!["Condition"]),
            ("system/Patient.read system/Condition.r", vec![]),
            ("system/Patient.cud", vec!["Patient", "Condition"]),
            ("system/Patient.rs?active=true system/Condition.*", vec![]),
        ] {
            assert_eq!(not_granted(granted, &two), missing, "{granted}");
        }
    }
}
