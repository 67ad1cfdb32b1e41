//! A connection from the host to a listener of the pod: bytes between loopback and a stream to the host.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bulkhead_agent_protocol::agent;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;

use super::NetworkError;
use crate::stream::{Host, Stream};

/// How long a listener whose queue is full may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Bytes in flight in each direction of a connection.
const BUFFER: usize = 16 << 10;

/// Connects to a listener, then to the host, and copies between them in the background.
pub(crate) async fn connect(
    host: &Host,
    request: &agent::ConnectListenerRequest,
) -> Result<(), NetworkError> {
    let port = u16::try_from(request.port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or(NetworkError::Port(request.port))?;
    let address = match request.ipv6 {
        true => IpAddr::V6(Ipv6Addr::LOCALHOST),
        false => IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
    let address = SocketAddr::new(address, port);
    let listener = reach(address)
        .await
        .map_err(|source| NetworkError::Connect { address, source })?;
    let stream = host
        .dial(request.stream_port)
        .await
        .map_err(|source| NetworkError::System {
            what: format!(
                "connect to port {} of the host for {address}",
                request.stream_port
            ),
            source,
        })?;
    tokio::spawn(copy(listener, stream));
    Ok(())
}

async fn reach(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = tokio::time::timeout(PATIENCE, TcpStream::connect(address))
        .await
        .map_err(|_| io::Error::from_raw_os_error(libc::ETIMEDOUT))??;
    // Without a listener a socket that happens to get this port connects to itself.
    if stream.local_addr()? == address {
        return Err(io::Error::from_raw_os_error(libc::ECONNREFUSED));
    }
    // What the client sends in small parts arrives so.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Copies until both directions have ended, each of which may end before the other. When one side breaks, the other does.
async fn copy(mut listener: TcpStream, mut stream: Stream) {
    if copy_bidirectional_with_sizes(&mut listener, &mut stream, BUFFER, BUFFER)
        .await
        .is_err()
    {
        // A reset, because end of file would say that everything has come.
        let _ = listener.set_zero_linger();
    }
}
