//! How containerd and the shim greet each other: what stands on the standard input and output of `start`, `delete` and `-info`,
//! and where the shim's socket is.
//!
//! | containerd | input of `start` | output of `start` |
//! | --- | --- | --- |
//! | up to 2.2, CRI-O | runtime options, a protobuf `Any`, or nothing | the address, plain: "version 2" |
//! | 2.3 and later | protobuf `BootstrapParams` | protobuf `BootstrapResult`, version 3 |

use std::path::{Path, PathBuf};

use containerd_shim_protos::{
    api::DeleteResponse,
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::{
        CodedInputStream, Message, MessageField,
        rt::skip_field_for_tag,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use sha2::{Digest, Sha256};

/// Where sockets are unless containerd says otherwise.
const SOCKET_DIR: &str = "/run/containerd/s";
/// `typeurl` of the OCI features document.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// `typeurl` of the runtime options that are ours to heed.
const OPTIONS: &str = "runtimeoptions.v1.Options";

/// What `start` reads from its standard input.
#[derive(Clone, Debug, PartialEq)]
pub enum Greeting {
    /// Runtime options, or nothing.
    Options(Option<Any>),
    /// The bootstrap protocol.
    Bootstrap(Box<BootstrapParams>),
}

impl Greeting {
    /// Tells the two forms apart: options can parse as parameters, but only parameters name this very instance.
    pub fn parse(bytes: &[u8], id: &str, namespace: &str) -> Greeting {
        if let Ok(params) = BootstrapParams::parse_from_bytes(bytes)
            && params.instance_id == id
            && params.namespace == namespace
            && !id.is_empty()
        {
            return Greeting::Bootstrap(Box::new(params));
        }
        let any = Any::parse_from_bytes(bytes).ok();
        Greeting::Options(any.filter(|any| !any.type_url.is_empty()))
    }

    /// Runtime options: the input itself, or its extension of that kind.
    pub fn options(&self) -> Option<&Any> {
        match self {
            Greeting::Options(options) => options.as_ref(),
            Greeting::Bootstrap(params) => {
                let mut values = params.extensions.iter().flat_map(|one| one.value.as_ref());
                values.find(|any| any.type_url.ends_with(OPTIONS))
            }
        }
    }

    /// Where the socket goes.
    pub fn socket_dir(&self) -> PathBuf {
        match self {
            Greeting::Bootstrap(params) if !params.socket_dir().is_empty() => {
                params.socket_dir().into()
            }
            _ => SOCKET_DIR.into(),
        }
    }

    /// Where events go: what the bootstrap protocol says, or else the environment, as every containerd sets it
    /// (`TTRPC_ADDRESS`). Empty: nobody wants to know.
    pub fn events_address(&self, environment: Option<String>) -> String {
        match self {
            Greeting::Bootstrap(params) if !params.containerd_ttrpc_address.is_empty() => {
                params.containerd_ttrpc_address.clone()
            }
            _ => environment.unwrap_or_default(),
        }
    }

    /// The answer on standard output.
    pub fn reply(&self, address: &str) -> Vec<u8> {
        match self {
            Greeting::Options(_) => address.as_bytes().to_vec(),
            Greeting::Bootstrap(_) => encode(&BootstrapResult {
                version: 3,
                address: address.into(),
                protocol: "ttrpc".into(),
                ..BootstrapResult::default()
            }),
        }
    }
}

/// The socket of the pod `group`: one for each containerd, namespace and pod, and short enough for sockaddr_un.
pub fn socket_path(directory: &Path, containerd: &str, namespace: &str, group: &str) -> PathBuf {
    let joined: Vec<&str> = [containerd, namespace, group]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect();
    let digest = Sha256::digest(joined.join("/"));
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    directory.join(name)
}

/// What `delete` prints: the container was killed.
pub fn delete_reply(pid: u32, now: std::time::SystemTime) -> Vec<u8> {
    encode(&DeleteResponse {
        pid,
        exit_status: 128 + libc::SIGKILL as u32,
        exited_at: MessageField::some(Timestamp::from(now)),
        ..DeleteResponse::default()
    })
}

/// What `-info` prints. `features` is the OCI features document as JSON.
pub fn info(options: Option<Any>, features: Vec<u8>) -> Vec<u8> {
    encode(&RuntimeInfo {
        name: "io.containerd.bulkhead.v1".into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..RuntimeVersion::default()
        }),
        options: options.into(),
        features: MessageField::some(Any {
            type_url: FEATURES.into(),
            value: features,
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    })
}

/// The configuration file that an engine's runtime options name (`ConfigPath` of containerd's and CRI-O's configuration,
/// `ctr run --runtime-config-path`), if they do.
///
/// # Errors
/// Options of this type that are no protobuf.
pub fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>, String> {
    let Some(options) = options.filter(|options| !options.value.is_empty()) else {
        return Ok(None);
    };
    if !options.type_url.ends_with(OPTIONS) {
        // runc's, which Docker, nerdctl and `ctr` send to everybody.
        tracing::info!(kind = %options.type_url, "runtime options of another runtime are ignored");
        return Ok(None);
    }
    let path = second_text(&options.value)
        .map_err(|error| format!("the runtime options cannot be read: {error}"))?;
    Ok(path.filter(|path| !path.is_empty()).map(PathBuf::from))
}

/// runtimeoptions/v1/api.proto: type_url = 1, config_path = 2, config_body = 3.
fn second_text(bytes: &[u8]) -> containerd_shim_protos::protobuf::Result<Option<String>> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut path = None;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag {
            CONFIG_PATH => path = Some(input.read_string()?),
            tag => skip_field_for_tag(tag, &mut input)?,
        }
    }
    Ok(path)
}

/// Field 2, length-delimited.
const CONFIG_PATH: u32 = 2 << 3 | 2;

fn encode(message: &impl Message) -> Vec<u8> {
    message
        .write_to_bytes()
        .expect("proto3 messages have no required fields")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A length-delimited field, by hand from the published .proto files.
    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
    }

    #[test]
    fn nothing_and_options_are_the_old_form() {
        assert_eq!(Greeting::parse(b"", "id", "ns"), Greeting::Options(None));
        // google.protobuf.Any{type_url = 1, value = 2}
        let any = [
            field(1, b"runtimeoptions.v1.Options"),
            field(2, b"\x12\x02/c"),
        ]
        .concat();
        let Greeting::Options(Some(any)) = Greeting::parse(&any, "id", "ns") else {
            panic!("not read as options");
        };
        assert_eq!(
            (any.type_url.as_str(), &any.value[..]),
            ("runtimeoptions.v1.Options", &b"\x12\x02/c"[..])
        );
        // Options whose bytes parse as parameters of something else.
        let other = [field(1, b"a"), field(2, b"b")].concat();
        assert!(matches!(
            Greeting::parse(&other, "id", "ns"),
            Greeting::Options(_)
        ));
        assert!(matches!(
            Greeting::parse(b"\xff\xff", "id", "ns"),
            Greeting::Options(None)
        ));
    }

    #[test]
    fn the_old_form_is_answered_with_the_plain_address() {
        let reply = Greeting::Options(None).reply("unix:///run/containerd/s/x");
        assert_eq!(reply, b"unix:///run/containerd/s/x");
    }

    #[test]
    fn the_bootstrap_form_is_read_and_answered_in_protobuf() {
        // bootstrap.proto: instance_id = 1, namespace = 2, log_level = 3, containerd_version = 4, containerd_ttrpc_address = 5,
        // containerd_grpc_address = 6, containerd_binary = 7, socket_dir = 9
        let params = [
            field(1, b"id"),
            field(2, b"ns"),
            vec![
                3 << 3,
                0xfc,
                0xff,
                0xff,
                0xff,
                0xff,
                0xff,
                0xff,
                0xff,
                0xff,
                0x01,
            ],
            field(4, b"2.3.0"),
            field(5, b"unix:///t"),
            field(9, b"/run/s"),
        ]
        .concat();
        let greeting = Greeting::parse(&params, "id", "ns");
        let Greeting::Bootstrap(read) = &greeting else {
            panic!("not read as parameters");
        };
        assert_eq!(read.containerd_ttrpc_address, "unix:///t");
        let other = || Some("unix:///environment".to_string());
        assert_eq!(greeting.events_address(other()), "unix:///t");
        assert_eq!(greeting.socket_dir(), Path::new("/run/s"));
        assert_eq!(greeting.options(), None);
        // BootstrapResult{version = 1, address = 2, protocol = 3}
        let expected = [vec![0x08, 0x03], field(2, b"unix:///x"), field(3, b"ttrpc")].concat();
        assert_eq!(greeting.reply("unix:///x"), expected);
        // extensions = 8, of Extension{value = 1}
        let any = [
            field(1, b"runtimeoptions.v1.Options"),
            field(2, b"\x12\x02/c"),
        ];
        let extension = field(8, &field(1, &any.concat()));
        let greeting = Greeting::parse(&[params.clone(), extension].concat(), "id", "ns");
        let path = config_path(greeting.options()).unwrap();
        assert_eq!(path.as_deref(), Some(Path::new("/c")));
        // The same bytes for another instance are options.
        assert!(matches!(
            Greeting::parse(&params, "other", "ns"),
            Greeting::Options(_)
        ));
    }

    #[test]
    fn events_go_where_the_environment_says_when_the_greeting_does_not() {
        let environment = || Some("unix:///environment".to_string());
        // Parameters without containerd_ttrpc_address, parameters with an empty one, and the old form.
        let bare = [field(1, b"id"), field(2, b"ns")].concat();
        let empty = [bare.clone(), field(5, b"")].concat();
        for bytes in [&bare[..], &empty, b""] {
            let greeting = Greeting::parse(bytes, "id", "ns");
            assert_eq!(
                greeting.events_address(environment()),
                environment().unwrap()
            );
            assert_eq!(greeting.events_address(None), "");
        }
    }

    #[test]
    fn delete_and_info_are_answered_in_protobuf() {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(5);
        // DeleteResponse{pid = 1, exit_status = 2, exited_at = 3}; Timestamp{seconds = 1}
        let expected = [vec![0x08, 7, 0x10, 0x89, 0x01], field(3, &[0x08, 5])].concat();
        assert_eq!(delete_reply(7, time), expected);
        // RuntimeInfo{name = 1, version = 2, options = 3, features = 4}
        let info = info(None, b"{}".to_vec());
        let name = field(1, b"io.containerd.bulkhead.v1");
        assert_eq!(info[..name.len()], name);
        let features = [field(1, FEATURES.as_bytes()), field(2, b"{}")].concat();
        assert!(info.ends_with(&field(4, &features)));
    }

    #[test]
    fn the_configuration_file_is_found_in_the_options() {
        let options = |kind: &str, value: Vec<u8>| Any {
            type_url: kind.into(),
            value,
            ..Any::default()
        };
        let named = [field(1, b"x"), field(2, b"/c.toml"), field(3, b"body")].concat();
        let ours = options("runtimeoptions.v1.Options", named);
        let path = config_path(Some(&ours)).unwrap();
        assert_eq!(path.as_deref(), Some(Path::new("/c.toml")));
        let other = options("containerd.runc.v1.Options", vec![0x08, 1]);
        assert_eq!(config_path(Some(&other)).unwrap(), None);
        assert_eq!(config_path(None).unwrap(), None);
        let broken = options("runtimeoptions.v1.Options", vec![0x12, 0xff]);
        config_path(Some(&broken)).unwrap_err();
    }

    #[test]
    fn the_socket_is_containerds_choice_of_name() {
        let path = socket_path(
            Path::new("/run/containerd/s"),
            "/run/containerd/containerd.sock",
            "default",
            "c",
        );
        // printf /run/containerd/containerd.sock/default/c | sha256sum
        let digest = "9cb583b155a36d5eb6ede9fb14dbf6eb7e8a23b3e803e95a337ba133e3043d85";
        assert_eq!(path, Path::new("/run/containerd/s").join(digest));
    }
}
