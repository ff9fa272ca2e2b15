//! Socket options of a fabric connection, derived from the failure budget.

use caravan_types::Timing;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use tokio::net::TcpStream;

/// Makes a dead host known within about the failure budget (at least three seconds, where the
/// connection is idle), and sends small frames at once.
pub fn tune(stream: &TcpStream, timing: Timing) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let every = timing.peer_probe();
    let keepalive = TcpKeepalive::new().with_time(every).with_interval(every);
    #[cfg(target_os = "linux")]
    {
        socket.set_tcp_keepalive(&keepalive.with_retries(Timing::PEER_PROBES))?;
        // Sent data that nobody acknowledges, or that nobody has room for.
        socket.set_tcp_user_timeout(Some(timing.unacknowledged()))
    }
    #[cfg(not(target_os = "linux"))]
    socket.set_tcp_keepalive(&keepalive)
}
