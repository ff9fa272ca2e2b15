//! Socket options of a fabric connection, derived from the failure budget.

use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;

/// Probes of an idle connection that may go unanswered; with the first one after a third of
/// the budget and a third between them, the last one is missed when the budget is spent.
const PROBES: u32 = 2;

/// The kernel counts keep-alive in whole seconds.
const SHORTEST: Duration = Duration::from_secs(1);

/// Makes a dead host known within about `detect` (at least three seconds, where the
/// connection is idle), and sends small frames at once.
pub fn tune(stream: &TcpStream, detect: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let third = (detect / (PROBES + 1)).max(SHORTEST);
    let keepalive = TcpKeepalive::new().with_time(third).with_interval(third);
    #[cfg(target_os = "linux")]
    {
        socket.set_tcp_keepalive(&keepalive.with_retries(PROBES))?;
        // Sent data that nobody acknowledges, or that nobody has room for.
        socket.set_tcp_user_timeout(Some(detect))
    }
    #[cfg(not(target_os = "linux"))]
    socket.set_tcp_keepalive(&keepalive)
}
