//! Hosts that a server's URLs may lead to: not to this machine, nor to its link, unless the server itself is there.
//! Links of a manifest, redirects, status URLs and token endpoints come from outside, and what answers on a loopback or
//! link-local address (a cloud's metadata service, an administrator's port) trusts whoever can reach it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use foundation::error::{Error, ErrorKind, Result};

/// Hosts that may be reached. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct SsrfGuard {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Hosts that the pipeline file or the environment names: whoever wrote those knows where they are.
    named: Vec<String>,
    /// The server's own.
    server: String,
}

/// Which addresses only this machine or its link has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AddressScope {
    Machine,
    Link,
}

fn near(address: IpAddr) -> Option<AddressScope> {
    match address {
        IpAddr::V4(v4) if v4.is_loopback() || v4.octets()[0] == 0 => Some(AddressScope::Machine),
        // The others are the metadata services of three clouds.
        IpAddr::V4(v4) => (v4.is_link_local()
            || matches!(v4.octets(), [168, 63, 129, 16] | [100, 100, 100, 200] | [192, 0, 0, 192]))
        .then_some(AddressScope::Link),
        IpAddr::V6(v6) if v6.is_loopback() || v6.is_unspecified() => Some(AddressScope::Machine),
        // The second is the metadata service of one cloud.
        IpAddr::V6(v6)
            if (v6.segments()[0] & 0xffc0) == 0xfe80 || v6 == Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x254) =>
        {
            Some(AddressScope::Link)
        }
        IpAddr::V6(v6) => near(v6.to_ipv4_mapped().or_else(|| embedded(v6))?.into()),
    }
}

/// An IPv4 address in one of the forms that are translated on the way: `64:ff9b::/96`, the local `64:ff9b:1::/48`,
/// `::ffff:0:0:0/96` (RFC 2765), `2002::/16` (6to4), and the old `::/96`.
fn embedded(v6: Ipv6Addr) -> Option<std::net::Ipv4Addr> {
    let segments = v6.segments();
    let of = |high: u16, low: u16| ((u32::from(high) << 16) | u32::from(low)).into();
    if segments[0] == 0x2002 {
        return Some(of(segments[1], segments[2]));
    }
    let is_translated = segments[..6] == [0x64, 0xff9b, 0, 0, 0, 0]
        || segments[..3] == [0x64, 0xff9b, 1]
        || segments[..6] == [0, 0, 0, 0, 0xffff, 0]
        || (segments[..6] == [0; 6] && segments[6] != 0);
    is_translated.then(|| of(segments[6], segments[7]))
}

fn host_of(url: &Url) -> String {
    url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase()
}

impl SsrfGuard {
    /// Returns the hosts that may be reached when the server is at `base`, beside the `named` hosts.
    pub(crate) fn new(base: &Url, named: impl IntoIterator<Item = String>) -> Self {
        let named = named.into_iter().map(|host| host.to_ascii_lowercase()).collect();
        Self { inner: Arc::new(Inner { named, server: host_of(base) }) }
    }

    /// Refuses a URL whose address is written out and near, where the server is not. Names are judged when they are
    /// resolved.
    pub(crate) async fn check(&self, url: &Url, what: &str) -> Result<()> {
        let address = match url.host() {
            Some(Host::Ipv4(v4)) => IpAddr::V4(v4),
            Some(Host::Ipv6(v6)) => IpAddr::V6(v6),
            _ => return Ok(()),
        };
        let near = near(address);
        if near.is_none() || self.inner.is_trusted(&host_of(url)) || self.inner.server_is_at().await == near {
            return Ok(());
        }
        Err(refused(what, &address.to_string()))
    }
}

fn refused(what: &str, place: &str) -> Error {
    Error::new(
        ErrorKind::Server,
        format!("{what}: {place} is an address of this machine or of its local link: not followed"),
    )
    .with_hint(
        "if the file server or token endpoint really is there, name it in the pipeline file: \
        source.token_origins, or source.auth.token_url",
    )
}

impl Inner {
    fn is_trusted(&self, host: &str) -> bool {
        host == self.server || self.named.iter().any(|named| named == host)
    }

    fn near_by_name(&self) -> Option<AddressScope> {
        match self.server.parse::<IpAddr>() {
            Ok(address) => near(address),
            Err(_) => {
                (self.server == "localhost" || self.server.ends_with(".localhost")).then_some(AddressScope::Machine)
            }
        }
    }

    /// Returns true if the server itself is on this machine, or on its link.
    async fn server_is_at(&self) -> Option<AddressScope> {
        if let Some(near) = self.near_by_name() {
            return Some(near);
        }
        let mut addresses = tokio::net::lookup_host((self.server.as_str(), 0)).await.ok()?;
        addresses.find_map(|address| near(address.ip()))
    }
}

impl Resolve for SsrfGuard {
    fn resolve(&self, name: Name) -> Resolving {
        let inner = self.inner.clone();
        Box::pin(async move {
            let name = name.as_str().to_ascii_lowercase();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if inner.is_trusted(&name) || found.iter().all(|address| near(address.ip()).is_none()) {
                return Ok(Box::new(found.into_iter()) as Addrs);
            }
            let server = inner.server_is_at().await;
            let allowed = |address: &SocketAddr| near(address.ip()).is_none_or(|near| server == Some(near));
            let far: Vec<SocketAddr> = found.into_iter().filter(allowed).collect();
            if far.is_empty() {
                let why = format!(
                    "{name} is an address of this machine or its link, and the server is not there: not followed"
                );
                return Err(why.into());
            }
            Ok(Box::new(far.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach(base: &str) -> SsrfGuard {
        SsrfGuard::new(&Url::parse(base).unwrap(), ["files.lan".to_owned(), "127.0.0.9".to_owned()])
    }

    // Breaks if a form of a near address is not known, or a server that is near cannot be used.
    #[tokio::test]
    async fn near_addresses_in_every_form() {
        let near = [
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0.0.0.0",
            "169.254.169.254",
            "[::1]",
            "[::]",
            "[fe80::1]",
            "[::ffff:127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[::ffff:a9fe:a9fe]",
            "[fd00:ec2::254]",
            "192.0.0.192",
            "[2002:7f00:1::1]",
            "[2002:a9fe:a9fe::1]",
            "[64:ff9b:1::7f00:1]",
            "[::ffff:0:7f00:1]",
        ];
        let (far, here) = (reach("https://192.0.2.7/fhir"), reach("http://127.0.0.1:8080/fhir"));
        for host in near {
            let url = Url::parse(&format!("http://{host}:9/x")).unwrap();
            let error = far.check(&url, "the download").await.unwrap_err();
            assert!(error.to_string().contains("not followed"), "{host}: {error}");
            let is_link = host.contains("169.254")
                || host.contains("a9fe")
                || host.contains("fe80")
                || host.contains("fd00")
                || host == "192.0.0.192";
            assert_eq!(
                here.check(&url, "the download").await.is_err(),
                is_link,
                "{host}: the server is on this machine, not its link"
            );
        }
        for host in ["10.0.0.1", "192.0.2.2", "[2001:db8::1]", "files.lan", "127.0.0.9"] {
            far.check(&Url::parse(&format!("http://{host}/x")).unwrap(), "x").await.unwrap();
        }
    }

    #[tokio::test]
    async fn names_are_judged_by_what_they_stand_for() {
        let name = || "localhost".parse::<Name>().unwrap();
        let error = reach("https://192.0.2.2/fhir").resolve(name()).await.err().unwrap();
        assert!(error.to_string().contains("not followed"), "{error}");
        assert!(reach("http://127.0.0.1/fhir").resolve(name()).await.unwrap().count() > 0);
        let named = SsrfGuard::new(&Url::parse("https://192.0.2.2/").unwrap(), ["localhost".to_owned()]);
        assert!(named.resolve(name()).await.unwrap().count() > 0);
    }
}
