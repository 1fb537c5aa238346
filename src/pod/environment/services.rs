//! The variables by which a container finds Services. Source: kubelet's `envvars/envvars.go`.

use std::collections::BTreeMap;

/// What of a Service is told: an address of the cluster and its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its `clusterIP`; never `None`.
    pub ip: Box<str>,
    /// Its ports, at least one, the first one first.
    pub ports: Box<[ServicePort]>,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; only the first may have none.
    pub name: Box<str>,
    /// Its number.
    pub port: u16,
    /// In lower case: `tcp`.
    pub protocol: Box<str>,
}

/// The variables of Services by their names.
#[must_use]
pub fn service_variables<'a>(
    services: impl IntoIterator<Item = (&'a str, &'a Service)>,
) -> BTreeMap<String, String> {
    let mut vars = BTreeMap::new();
    for (name, service) in services {
        let name = variable(name);
        let Service { ip, ports } = service;
        let Some(first) = ports.first() else { continue };
        vars.insert(format!("{name}_SERVICE_HOST"), ip.to_string());
        vars.insert(format!("{name}_SERVICE_PORT"), first.port.to_string());
        for port in ports.iter().filter(|port| !port.name.is_empty()) {
            vars.insert(format!("{name}_SERVICE_PORT_{}", variable(&port.name)), port.port.to_string());
        }
        // As Docker's links had them.
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_string() };
        let url = |port: &ServicePort| format!("{}://{host}:{}", port.protocol, port.port);
        vars.insert(format!("{name}_PORT"), url(first));
        for port in ports {
            let prefix = format!("{name}_PORT_{}_{}", port.port, port.protocol.to_uppercase());
            vars.insert(format!("{prefix}_PROTO"), port.protocol.to_string());
            vars.insert(format!("{prefix}_PORT"), port.port.to_string());
            vars.insert(format!("{prefix}_ADDR"), ip.to_string());
            vars.insert(prefix, url(port));
        }
    }
    vars
}

fn variable(name: &str) -> String {
    name.replace('-', "_").to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(ip: &str, ports: &[(&str, u16, &str)]) -> Service {
        let ports = ports.iter().map(|(name, port, protocol)| ServicePort {
            name: (*name).into(),
            port: *port,
            protocol: (*protocol).into(),
        });
        Service { ip: ip.into(), ports: ports.collect() }
    }

    /// The cases of envvars_test.go.
    #[test]
    fn services_are_told_as_a_kubelet_tells_them() {
        let services = [
            ("foo-bar", service("1.2.3.4", &[("", 8080, "tcp")])),
            ("abc-123", service("5.6.7.8", &[("u-d-p", 8081, "udp"), ("t-c-p", 8081, "tcp")])),
            ("super-ipv6", service("2001:DB8::", &[("u-d-p", 8084, "udp")])),
        ];
        let got = service_variables(services.iter().map(|(name, service)| (*name, service)));
        let wanted = "\
ABC_123_PORT=udp://5.6.7.8:8081
ABC_123_PORT_8081_TCP=tcp://5.6.7.8:8081
ABC_123_PORT_8081_TCP_ADDR=5.6.7.8
ABC_123_PORT_8081_TCP_PORT=8081
ABC_123_PORT_8081_TCP_PROTO=tcp
ABC_123_PORT_8081_UDP=udp://5.6.7.8:8081
ABC_123_PORT_8081_UDP_ADDR=5.6.7.8
ABC_123_PORT_8081_UDP_PORT=8081
ABC_123_PORT_8081_UDP_PROTO=udp
ABC_123_SERVICE_HOST=5.6.7.8
ABC_123_SERVICE_PORT=8081
ABC_123_SERVICE_PORT_T_C_P=8081
ABC_123_SERVICE_PORT_U_D_P=8081
FOO_BAR_PORT=tcp://1.2.3.4:8080
FOO_BAR_PORT_8080_TCP=tcp://1.2.3.4:8080
FOO_BAR_PORT_8080_TCP_ADDR=1.2.3.4
FOO_BAR_PORT_8080_TCP_PORT=8080
FOO_BAR_PORT_8080_TCP_PROTO=tcp
FOO_BAR_SERVICE_HOST=1.2.3.4
FOO_BAR_SERVICE_PORT=8080
SUPER_IPV6_PORT=udp://[2001:DB8::]:8084
SUPER_IPV6_PORT_8084_UDP=udp://[2001:DB8::]:8084
SUPER_IPV6_PORT_8084_UDP_ADDR=2001:DB8::
SUPER_IPV6_PORT_8084_UDP_PORT=8084
SUPER_IPV6_PORT_8084_UDP_PROTO=udp
SUPER_IPV6_SERVICE_HOST=2001:DB8::
SUPER_IPV6_SERVICE_PORT=8084
SUPER_IPV6_SERVICE_PORT_U_D_P=8084
";
        let got: String = got.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        assert_eq!(got, wanted);
    }
}
