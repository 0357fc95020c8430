use jiff::Timestamp;

use super::*;
use crate::decode::{Blind, Scan};
use crate::event::{Family, StateAt};

const SECOND: u64 = 1_000_000_000;

/// A server's end of one HTTP/1.1 exchange without `Connection` headers, closed by the server at once, with FINs.
fn socket() -> Socket {
    Socket {
        at_ns: 10 * SECOND + 3_000_000,
        cookie: 1,
        cookie_late: false,
        netns: 1,
        bound_dev: 0,
        family: Family::Ipv4,
        local: "127.0.0.1:8080".parse().expect("an address"),
        remote: "127.0.0.1:43210".parse().expect("an address"),
        role: Role::Server,
        owner: None,
        closer: None,
        first_end: ClosedBy::Local,
        old: TcpState::FinWait2,
        new: TcpState::Close,
        states: vec![(TcpState::Established, 10 * SECOND)],
        established_ns: Some(10 * SECOND),
        payload_ns: Some(10 * SECOND + 1_000_000),
        end_ns: Some(10 * SECOND + 2_000_000),
        started_before: false,
        fin_received: true,
        all_acknowledged: true,
        rst_received: false,
        rst_sent: false,
        closed_by_exit: false,
        closed_in_walk: false,
        time_wait_room: Some(true),
        in_process: false,
        shut_down: false,
        sk_err: 0,
        rx_bytes: 100,
        tx_bytes: 200,
        protocol: Protocol::Http11,
        http: Some(http()),
        scan: Scan::default(),
        blind: Blind::default(),
    }
}

fn http() -> Http {
    Http {
        requests: 1,
        responses: 1,
        method: Some("GET".to_owned()),
        target: Some("/x".to_owned()),
        target_truncated: false,
        status: Some(200),
        request_version: Some(HttpVersion::V11),
        response_version: Some(HttpVersion::V11),
        request_connection: Some(Connection::Absent),
        response_connection: Some(Connection::Absent),
        keep_alive_timeout_s: None,
        keep_alive_max: None,
        answered: true,
    }
}

const CLOSE: Option<Connection> =
    Some(Connection::Tokens { close: true, keep_alive: false, upgrade: false, other: false });
const KEEP_ALIVE: Option<Connection> =
    Some(Connection::Tokens { close: false, keep_alive: true, upgrade: false, other: false });
const ABSENT: Option<Connection> = Some(Connection::Absent);
const UNOBSERVED: Option<Connection> = Some(Connection::Unobserved);

fn with(change: impl FnOnce(&mut Socket)) -> Socket {
    let mut socket = socket();
    change(&mut socket);
    socket
}

fn with_http(change: impl FnOnce(&mut Http)) -> Socket {
    with(|socket| change(socket.http.as_mut().expect("HTTP")))
}

fn judge(socket: &Socket) -> Cause {
    cause(socket, &ending(socket))
}

fn ended(closed_by: ClosedBy, how: Option<How>, fate: Final, source: FinalSource) -> Ending {
    Ending { closed_by, how, fate: Fate::Known(fate, source) }
}

fn idle(socket: &mut Socket, ms: u64) {
    let end = socket.payload_ns.expect("payload") + ms * 1_000_000;
    socket.end_ns = Some(end);
    socket.at_ns = end + 1_000_000;
}

/// The close that would be printed.
fn close(socket: &Socket) -> Close {
    let ending = ending(socket);
    Close {
        time: Timestamp::UNIX_EPOCH,
        cookie: socket.cookie,
        netns: socket.netns,
        family: socket.family,
        local: socket.local,
        remote: socket.remote,
        role: socket.role,
        process: None,
        closed_by: ending.closed_by,
        closer: None,
        how: ending.how,
        fate: None,
        fate_source: None,
        states: socket.states.iter().map(|(state, _)| StateAt { state: *state, at_us: 0 }).collect(),
        duration_us: 0,
        started_before: socket.started_before,
        idle_us: idle_us(socket),
        rx_bytes: socket.rx_bytes,
        tx_bytes: socket.tx_bytes,
        protocol: socket.protocol,
        http: socket.http.clone(),
        cause: cause(socket, &ending),
    }
}

fn advised(socket: &Socket) -> String {
    advice(&close(socket)).unwrap_or_default().into_owned()
}

mod endings {
    use super::*;
    use crate::event::{Final::*, FinalSource::State};

    #[test]
    fn an_active_close_leaves_time_wait() {
        let fin = ended(ClosedBy::Local, Some(How::Fin), TimeWait, FinalSource::Fin);
        assert_eq!(ending(&socket()), fin);
        assert_eq!(ending(&with(|s| s.old = TcpState::FinWait1)), fin);
        // The kernel does not tell how full the table is; or tells that it is full.
        let inferred = ended(ClosedBy::Local, Some(How::Fin), TimeWait, FinalSource::Inferred);
        assert_eq!(ending(&with(|s| s.time_wait_room = None)), inferred);
        assert_eq!(ending(&with(|s| s.time_wait_room = Some(false))).fate, Fate::Ask);
        // It was not seen who was first, but the state says it.
        assert_eq!(ending(&with(|s| s.first_end = ClosedBy::None)), fin);
        // An error that ICMP left behind long before.
        assert_eq!(ending(&with(|s| s.sk_err = 113)), fin);
    }

    #[test]
    fn without_the_peers_fin_the_kernel_is_asked() {
        let asked = Ending { closed_by: ClosedBy::Local, how: Some(How::Fin), fate: Fate::Ask };
        assert_eq!(ending(&with(|s| s.fin_received = false)), asked);
        assert_eq!(ending(&with(|s| (s.fin_received, s.time_wait_room) = (false, None))), asked);
        let unreachable = with(|s| (s.fin_received, s.sk_err) = (false, 113));
        assert_eq!(ending(&unreachable), asked);
    }

    #[test]
    fn fin_wait2_can_end_otherwise() {
        let no_fin = |change: fn(&mut Socket)| {
            ending(&with(|s| {
                s.fin_received = false;
                change(s);
            }))
        };
        let reset = ended(ClosedBy::Local, Some(How::Rst), Reset, State);
        assert_eq!(no_fin(|s| s.rst_received = true), reset);
        assert_eq!(no_fin(|s| s.rst_sent = true), reset);
        let timeout = ended(ClosedBy::Local, Some(How::Timeout), TimedOut, State);
        assert_eq!(no_fin(|s| s.sk_err = 110), timeout);
        assert_eq!(no_fin(|s| (s.sk_err, s.rst_sent) = (113, true)), timeout);
    }

    #[test]
    fn a_simultaneous_close_leaves_time_wait() {
        // Where the programs were not shown the transition to CLOSING, they only know that our FIN left first.
        for (first, by) in
            [(ClosedBy::Both, ClosedBy::Both), (ClosedBy::Local, ClosedBy::Both), (ClosedBy::Remote, ClosedBy::Remote)]
        {
            let closing = with(|s| (s.old, s.first_end) = (TcpState::Closing, first));
            assert_eq!(ending(&closing), ended(by, Some(How::Fin), TimeWait, FinalSource::Fin));
        }
        let unseen = with(|s| (s.old, s.first_end) = (TcpState::Closing, ClosedBy::None));
        assert_eq!(ending(&unseen).closed_by, ClosedBy::Both);
        let full = with(|s| (s.old, s.time_wait_room) = (TcpState::Closing, Some(false)));
        assert_eq!(ending(&full).fate, Fate::Ask);
        let reset = with(|s| (s.old, s.rst_received) = (TcpState::Closing, true));
        assert_eq!(ending(&reset), ended(ClosedBy::Both, Some(How::Rst), Reset, State));
    }

    #[test]
    fn an_end_before_our_fin_was_acknowledged_is_the_applications() {
        // `close` with unread data or SO_LINGER 0 after `shutdown`: a RST may follow, a TIME_WAIT does not.
        for (old, by) in [(TcpState::Closing, ClosedBy::Both), (TcpState::LastAck, ClosedBy::Remote)] {
            let early = with(|s| (s.old, s.first_end, s.all_acknowledged) = (old, by, false));
            assert_eq!(ending(&early), Ending { closed_by: by, how: Some(How::Fin), fate: Fate::Ask });
        }
    }

    #[test]
    fn whatever_icmp_said_of_a_peer_that_did_not_answer_it_is_a_time_out() {
        for sk_err in [13, 92, 100, 101, 111, 112, 113] {
            let gone = with(|s| {
                (s.old, s.first_end, s.fin_received, s.sk_err) = (TcpState::Established, ClosedBy::None, false, sk_err);
            });
            assert_eq!(ending(&gone), ended(ClosedBy::None, Some(How::Timeout), TimedOut, State), "{sk_err}");
        }
        // An attempt to connect ends at once when ICMP refuses it: that is no time-out.
        let refused = with(|s| {
            (s.old, s.first_end, s.fin_received, s.sk_err) = (TcpState::SynSent, ClosedBy::None, false, 113);
        });
        assert_eq!(ending(&refused), ended(ClosedBy::None, None, Closed, State));
    }

    #[test]
    fn an_old_error_of_icmp_is_no_time_out_where_a_process_ends_the_socket() {
        for (old, first) in [(TcpState::Established, ClosedBy::None), (TcpState::FinWait1, ClosedBy::Local)] {
            let unread = with(|s| {
                (s.old, s.first_end, s.fin_received) = (old, first, false);
                (s.sk_err, s.in_process, s.shut_down) = (113, true, true);
            });
            assert_eq!(ending(&unread), ended(ClosedBy::Local, Some(How::Rst), Reset, State), "{old:?}");
        }
    }

    #[test]
    fn a_timer_that_found_the_socket_locked_is_run_by_the_process_and_still_a_time_out() {
        let given_up = with(|s| {
            (s.old, s.first_end, s.fin_received) = (TcpState::Established, ClosedBy::None, false);
            (s.sk_err, s.in_process) = (113, true);
        });
        assert_eq!(ending(&given_up), ended(ClosedBy::None, Some(How::Timeout), TimedOut, State));
    }

    #[test]
    fn a_first_fin_from_before_the_start_has_no_known_time() {
        let half_closed = with(|s| (s.end_ns, s.first_end, s.payload_ns) = (None, ClosedBy::Remote, Some(1)));
        assert_eq!(idle_us(&half_closed), None);
        let aborted =
            with(|s| (s.at_ns, s.end_ns, s.first_end, s.payload_ns) = (5_000, None, ClosedBy::None, Some(1_000)));
        assert_eq!(idle_us(&aborted), Some(4));
    }

    #[test]
    fn a_passive_close_leaves_nothing() {
        let last_ack = |change: fn(&mut Socket)| {
            ending(&with(|s| {
                (s.old, s.first_end) = (TcpState::LastAck, ClosedBy::Remote);
                change(s);
            }))
        };
        assert_eq!(last_ack(|_| ()), ended(ClosedBy::Remote, Some(How::Fin), Closed, State));
        assert_eq!(last_ack(|s| s.first_end = ClosedBy::None).closed_by, ClosedBy::Remote);
        let reset = ended(ClosedBy::Remote, Some(How::Rst), Reset, State);
        assert_eq!(last_ack(|s| s.rst_received = true), reset);
        let timeout = ended(ClosedBy::Remote, Some(How::Timeout), TimedOut, State);
        assert_eq!(last_ack(|s| s.sk_err = 110), timeout);
    }

    #[test]
    fn an_end_from_the_middle_is_a_reset_of_ours() {
        for old in [TcpState::Established, TcpState::SynRecv, TcpState::FinWait1] {
            let silent = with(|s| {
                (s.old, s.first_end, s.fin_received, s.in_process) = (old, ClosedBy::None, false, true);
            });
            assert_eq!(ending(&silent), ended(ClosedBy::Local, Some(How::Rst), Reset, State), "{old:?}");
        }
        // The peer's FIN came first: it began the end.
        let half = with(|s| (s.old, s.first_end) = (TcpState::CloseWait, ClosedBy::Remote));
        assert_eq!(ending(&half), ended(ClosedBy::Remote, Some(How::Rst), Reset, State));
    }

    #[test]
    fn an_orphan_that_the_kernel_gave_up_was_not_reset() {
        let orphan = |rst_sent| with(|s| (s.old, s.fin_received, s.rst_sent) = (TcpState::FinWait1, false, rst_sent));
        assert_eq!(ending(&orphan(false)), Ending { closed_by: ClosedBy::Local, how: None, fate: Fate::Ask });
        assert_eq!(ending(&orphan(true)), ended(ClosedBy::Local, Some(How::Rst), Reset, State));
    }

    #[test]
    fn time_outs() {
        for (sk_err, rst_sent) in [(110, false), (110, true), (113, false), (101, false), (112, false)] {
            let dead = with(|s| {
                (s.old, s.first_end, s.fin_received) = (TcpState::Established, ClosedBy::None, false);
                (s.sk_err, s.rst_sent) = (sk_err, rst_sent);
            });
            assert_eq!(ending(&dead), ended(ClosedBy::None, Some(How::Timeout), TimedOut, State), "{sk_err}");
        }
        let unacknowledged = with(|s| (s.old, s.fin_received, s.sk_err) = (TcpState::FinWait1, false, 110));
        assert_eq!(ending(&unacknowledged), ended(ClosedBy::Local, Some(How::Timeout), TimedOut, State));
    }

    #[test]
    fn resets_from_the_peer() {
        for old in [TcpState::Established, TcpState::SynSent, TcpState::SynRecv, TcpState::FinWait1] {
            let reset = with(|s| (s.old, s.first_end, s.rst_received) = (old, ClosedBy::None, true));
            assert_eq!(ending(&reset), ended(ClosedBy::Remote, Some(How::Rst), Reset, State), "{old:?}");
        }
        // The error is proof enough, but not where this end answered data after its close.
        let unseen = with(|s| (s.old, s.first_end, s.sk_err) = (TcpState::Established, ClosedBy::None, 104));
        assert_eq!(ending(&unseen).closed_by, ClosedBy::Remote);
        let late_data = with(|s| {
            (s.old, s.first_end, s.fin_received, s.sk_err, s.rst_sent) =
                (TcpState::FinWait1, ClosedBy::Local, false, 104, true);
        });
        assert_eq!(ending(&late_data), ended(ClosedBy::Local, Some(How::Rst), Reset, State));
        assert_eq!(judge(&late_data), Cause::ResetByLocal);
    }

    #[test]
    fn handshakes_that_failed() {
        let syn_sent = |sk_err, rst_received| {
            ending(&with(|s| {
                (s.old, s.first_end, s.fin_received) = (TcpState::SynSent, ClosedBy::None, false);
                (s.sk_err, s.rst_received, s.in_process) = (sk_err, rst_received, sk_err == 0);
            }))
        };
        assert_eq!(syn_sent(111, true), ended(ClosedBy::Remote, Some(How::Rst), Reset, State));
        assert_eq!(syn_sent(110, false), ended(ClosedBy::None, Some(How::Timeout), TimedOut, State));
        assert_eq!(syn_sent(0, false), ended(ClosedBy::None, None, Closed, State));
        // ICMP: port unreachable.
        assert_eq!(syn_sent(111, false), ended(ClosedBy::None, None, Closed, State));
    }

    #[test]
    fn aborts() {
        let abort = |rst_sent, first_end| {
            ending(&with(|s| {
                (s.old, s.fin_received, s.sk_err) = (TcpState::Established, false, 103);
                (s.rst_sent, s.first_end) = (rst_sent, first_end);
            }))
        };
        assert_eq!(abort(true, ClosedBy::Local), ended(ClosedBy::Local, Some(How::Rst), Reset, State));
        assert_eq!(abort(false, ClosedBy::None), ended(ClosedBy::None, None, Closed, State));
    }
}

mod causes {
    use super::*;

    #[test]
    fn timeout() {
        let dead = |s: &mut Socket| {
            (s.old, s.first_end, s.fin_received, s.sk_err) = (TcpState::Established, ClosedBy::None, false, 110);
        };
        assert_eq!(judge(&with(dead)), Cause::Timeout);
        assert_eq!(advised(&with(dead)), "peer no longer answered");
        let never = with(|s| {
            dead(s);
            (s.old, s.states, s.established_ns) = (TcpState::SynSent, vec![(TcpState::SynSent, 1)], None);
        });
        assert_eq!((judge(&never), advised(&never).as_str()), (Cause::Timeout, "connection attempt timed out"));
    }

    #[test]
    fn reset_by_peer() {
        let reset = with(|s| s.rst_received = true);
        assert_eq!((judge(&reset), advised(&reset).as_str()), (Cause::ResetByPeer, "reset by peer"));
        // Before all else that would fit, in every state.
        let exiting = with(|s| (s.rst_received, s.rst_sent, s.closed_by_exit, s.rx_bytes) = (true, true, true, 0));
        assert_eq!(judge(&exiting), Cause::ResetByPeer);
        assert_eq!(judge(&with(|s| (s.old, s.rst_received) = (TcpState::LastAck, true))), Cause::ResetByPeer);
        let refused = with(|s| {
            (s.old, s.rst_received, s.sk_err, s.http) = (TcpState::SynSent, true, 111, None);
            s.states = vec![(TcpState::SynSent, 1)];
        });
        assert_eq!((judge(&refused), advised(&refused).as_str()), (Cause::ResetByPeer, "connection refused"));
        let in_vain = with(|s| {
            s.rst_received = true;
            let http = s.http.as_mut().expect("HTTP");
            (http.answered, http.responses, http.status, http.response_connection) = (false, 0, None, None);
        });
        assert_eq!(advised(&in_vain), "reset by peer, no answer to GET /x");
    }

    #[test]
    fn reset_by_local() {
        let linger = with(|s| (s.old, s.fin_received, s.closed_by_exit) = (TcpState::Established, false, true));
        assert_eq!(judge(&linger), Cause::ResetByLocal);
        assert_eq!(advised(&linger), "closed with unread data or SO_LINGER 0");
        // What the kernel said only after the end of the socket.
        let mut late = ending(&with(|s| s.fin_received = false));
        late.how = Some(How::Rst);
        assert_eq!(cause(&socket(), &late), Cause::ResetByLocal);
        // A RST in the handshake that did not end it.
        assert_eq!(judge(&with(|s| s.rst_sent = true)), Cause::NoReuse);
    }

    #[test]
    fn process_exit() {
        for by in [ClosedBy::Local, ClosedBy::Both] {
            let exit = with(|s| (s.closed_by_exit, s.first_end, s.rx_bytes, s.tx_bytes) = (true, by, 0, 0));
            assert_eq!(judge(&exit), Cause::ProcessExit);
        }
        assert_eq!(advised(&with(|s| s.closed_by_exit = true)), "its process exited");
        // The peer was first: the exit is not the cause.
        let late = with(|s| {
            (s.closed_by_exit, s.first_end, s.old) = (true, ClosedBy::Remote, TcpState::LastAck);
            s.http.as_mut().expect("HTTP").request_connection = CLOSE;
        });
        assert_eq!(judge(&late), Cause::RequestClose);
    }

    #[test]
    fn unused() {
        let unused = |s: &mut Socket| {
            (s.rx_bytes, s.tx_bytes, s.protocol, s.http, s.payload_ns) = (0, 0, Protocol::None, None, None);
        };
        assert_eq!(judge(&with(unused)), Cause::Unused);
        assert_eq!(advised(&with(unused)), "opened but never used");
        let one_byte = with(|s| {
            unused(s);
            (s.rx_bytes, s.protocol) = (1, Protocol::Other);
        });
        assert_eq!(judge(&one_byte), Cause::NotHttp);
    }

    #[test]
    fn tls() {
        let tls = with(|s| (s.protocol, s.http) = (Protocol::Tls, None));
        assert_eq!((judge(&tls), advice(&close(&tls))), (Cause::Tls, None));
    }

    #[test]
    fn upgraded() {
        assert_eq!(judge(&with(|s| s.scan.upgraded = true)), Cause::Upgraded);
        assert_eq!(judge(&with(|s| s.protocol = Protocol::Websocket)), Cause::Upgraded);
        // Before h2: that is what it was upgraded to.
        assert_eq!(judge(&with(|s| (s.scan.upgraded, s.protocol) = (true, Protocol::H2))), Cause::Upgraded);
    }

    #[test]
    fn h2() {
        assert_eq!(judge(&with(|s| (s.protocol, s.http) = (Protocol::H2, None))), Cause::H2);
    }

    #[test]
    fn not_http() {
        assert_eq!(judge(&with(|s| (s.protocol, s.http) = (Protocol::Other, None))), Cause::NotHttp);
    }

    #[test]
    fn unanswered() {
        let in_vain = |http: &mut Http| {
            (http.answered, http.responses, http.status) = (false, 0, None);
            (http.response_version, http.response_connection) = (None, None);
        };
        assert_eq!(judge(&with_http(in_vain)), Cause::Unanswered);
        assert_eq!(advised(&with_http(in_vain)), "no answer to GET /x");
        // Though it asked to close; and though an earlier one was answered.
        let closing = with_http(|http| {
            in_vain(http);
            (http.request_connection, http.requests, http.responses) = (CLOSE, 2, 1);
        });
        assert_eq!(judge(&closing), Cause::Unanswered);
        // The head had only begun.
        let begun = with_http(|http| {
            in_vain(http);
            (http.requests, http.request_connection) = (0, UNOBSERVED);
        });
        assert_eq!(judge(&begun), Cause::Unanswered);
        // The answer may be in what was not seen.
        let unseen = with(|s| {
            s.scan.responses_lost = true;
            let http = s.http.as_mut().expect("HTTP");
            in_vain(http);
            http.response_connection = UNOBSERVED;
        });
        assert_eq!(judge(&unseen), Cause::Unknown);
    }

    #[test]
    fn truncated() {
        let short = |s: &mut Socket| s.scan.body_incomplete = true;
        assert_eq!(judge(&with(short)), Cause::Truncated);
        assert_eq!(advised(&with(short)), "server cut its response short");
        let left = with(|s| {
            short(s);
            (s.first_end, s.old) = (ClosedBy::Remote, TcpState::LastAck);
            s.http.as_mut().expect("HTTP").response_connection = CLOSE;
        });
        assert_eq!(
            (judge(&left), advised(&left).as_str()),
            (Cause::Truncated, "client left before the response's end")
        );
        let unseen = with(|s| (s.scan.body_incomplete, s.scan.responses_lost) = (true, true));
        assert_eq!(judge(&unseen), Cause::Unknown);
    }

    #[test]
    fn request_close() {
        for response in [ABSENT, CLOSE, KEEP_ALIVE] {
            let asked = with_http(|http| (http.request_connection, http.response_connection) = (CLOSE, response));
            assert_eq!(
                (judge(&asked), advised(&asked).as_str()),
                (Cause::RequestClose, "client asked: Connection: close")
            );
        }
        // `close` wins over `keep-alive` in one header.
        let both = Some(Connection::Tokens { close: true, keep_alive: true, upgrade: false, other: false });
        assert_eq!(judge(&with_http(|http| http.request_connection = both)), Cause::RequestClose);
        // Before HTTP/1.0 and idle time.
        let old = with(|s| {
            idle(s, 5_000);
            let http = s.http.as_mut().expect("HTTP");
            (http.request_connection, http.request_version) = (CLOSE, Some(HttpVersion::V10));
        });
        assert_eq!(judge(&old), Cause::RequestClose);
    }

    #[test]
    fn response_close() {
        let told = with_http(|http| http.response_connection = CLOSE);
        assert_eq!(
            (judge(&told), advised(&told).as_str()),
            (Cause::ResponseClose, "server answered: Connection: close")
        );
        let error = with_http(|http| (http.response_connection, http.status) = (CLOSE, Some(400)));
        assert_eq!(advised(&error), "server answered 400: Connection: close");
        let old = with_http(|http| (http.response_connection, http.request_version) = (CLOSE, Some(HttpVersion::V10)));
        assert_eq!((judge(&old), advised(&old).as_str()), (Cause::ResponseClose, "HTTP/1.0 client, no keep-alive"));
        // A response that nobody asked for; but only if it is certain that nobody did.
        let unasked = |s: &mut Socket| {
            let http = s.http.as_mut().expect("HTTP");
            (http.requests, http.method, http.target, http.request_version) = (0, None, None, None);
            (http.request_connection, http.response_connection, http.status) = (None, CLOSE, Some(408));
        };
        assert_eq!(judge(&with(unasked)), Cause::ResponseClose);
        for blind in [|s: &mut Socket| s.started_before = true, |s: &mut Socket| s.scan.requests_lost = true] {
            let socket = with(|s| {
                unasked(s);
                blind(s);
            });
            assert_eq!(judge(&socket), Cause::Unknown);
        }
    }

    #[test]
    fn http10() {
        let versions = [
            // Request, its Connection, response, its Connection.
            ((HttpVersion::V10, ABSENT), (HttpVersion::V11, ABSENT), Cause::Http10, "HTTP/1.0 client, no keep-alive"),
            ((HttpVersion::V10, ABSENT), (HttpVersion::V10, ABSENT), Cause::Http10, "HTTP/1.0 client, no keep-alive"),
            (
                (HttpVersion::V10, ABSENT),
                (HttpVersion::V11, KEEP_ALIVE),
                Cause::Http10,
                "HTTP/1.0 client, no keep-alive",
            ),
            ((HttpVersion::V11, ABSENT), (HttpVersion::V10, ABSENT), Cause::Http10, "HTTP/1.0 server, no keep-alive"),
            (
                (HttpVersion::V11, KEEP_ALIVE),
                (HttpVersion::V10, ABSENT),
                Cause::Http10,
                "HTTP/1.0 server, no keep-alive",
            ),
            (
                (HttpVersion::V10, KEEP_ALIVE),
                (HttpVersion::V10, ABSENT),
                Cause::Http10,
                "server ignored HTTP/1.0 keep-alive",
            ),
            (
                (HttpVersion::V10, KEEP_ALIVE),
                (HttpVersion::V11, ABSENT),
                Cause::Http10,
                "server ignored HTTP/1.0 keep-alive",
            ),
            (
                (HttpVersion::V10, KEEP_ALIVE),
                (HttpVersion::V10, KEEP_ALIVE),
                Cause::NoReuse,
                "server closed, nobody asked",
            ),
            (
                (HttpVersion::V10, KEEP_ALIVE),
                (HttpVersion::V11, KEEP_ALIVE),
                Cause::NoReuse,
                "server closed, nobody asked",
            ),
            ((HttpVersion::V11, ABSENT), (HttpVersion::V10, KEEP_ALIVE), Cause::NoReuse, "server closed, nobody asked"),
            ((HttpVersion::V11, ABSENT), (HttpVersion::V11, ABSENT), Cause::NoReuse, "server closed, nobody asked"),
        ];
        for ((asked_version, asked), (told_version, told), cause, words) in versions {
            let socket = with_http(|http| {
                (http.request_version, http.request_connection) = (Some(asked_version), asked);
                (http.response_version, http.response_connection) = (Some(told_version), told);
            });
            assert_eq!(
                (judge(&socket), advised(&socket).as_str()),
                (cause, words),
                "{asked_version:?} {told_version:?}"
            );
        }
        // A body that ends with the connection is what HTTP/1.0 does; idle time does not matter.
        let body = with(|s| {
            idle(s, 9_000);
            s.scan.body_until_close = true;
            s.http.as_mut().expect("HTTP").response_version = Some(HttpVersion::V10);
        });
        assert_eq!(judge(&body), Cause::Http10);
    }

    #[test]
    fn idle_timeout() {
        let after = |ms, announced| {
            with(|s| {
                idle(s, ms);
                s.http.as_mut().expect("HTTP").keep_alive_timeout_s = announced;
            })
        };
        assert_eq!(judge(&after(999, None)), Cause::NoReuse);
        assert_eq!(judge(&after(1_000, None)), Cause::IdleTimeout);
        assert_eq!(judge(&after(900, Some(1))), Cause::IdleTimeout);
        assert_eq!(judge(&after(899, Some(1))), Cause::NoReuse);
        assert_eq!(judge(&after(2, Some(0))), Cause::NoReuse);
        assert_eq!(judge(&after(60_000, Some(5))), Cause::IdleTimeout);
        assert_eq!(advised(&after(1_004, None)), "server's keep-alive time-out: idle 1.0 s");
        assert_eq!(advised(&after(600_000, None)), "server's keep-alive time-out: idle 600 s");
        let mut client = after(4_200, None);
        (client.first_end, client.old) = (ClosedBy::Remote, TcpState::LastAck);
        assert_eq!(advised(&client), "client closed it after 4.2 s idle");
        (client.role, client.first_end) = (Role::Unknown, ClosedBy::Remote);
        assert_eq!(advised(&client), "closed after 4.2 s idle");
    }

    #[test]
    fn idle_time_alone_says_nothing() {
        // Open before tracing began, and no head seen since then.
        let blind = with(|s| {
            idle(s, 30_000);
            (s.started_before, s.protocol, s.http) = (true, Protocol::Unobserved, None);
        });
        assert_eq!((judge(&blind), advice(&close(&blind))), (Cause::Unknown, None));
        // No payload since then either: idle for how long is not known.
        let silent =
            with(|s| (s.started_before, s.payload_ns, s.http, s.protocol) = (true, None, None, Protocol::Unobserved));
        assert_eq!(judge(&silent), Cause::Unknown);
    }

    #[test]
    fn no_reuse() {
        assert_eq!((judge(&socket()), advised(&socket()).as_str()), (Cause::NoReuse, "server closed, nobody asked"));
        let client = with(|s| (s.first_end, s.old) = (ClosedBy::Remote, TcpState::LastAck));
        assert_eq!(
            (judge(&client), advised(&client).as_str()),
            (Cause::NoReuse, "client did not reuse the connection")
        );
        let mirrored = with(|s| s.role = Role::Client);
        assert_eq!(advised(&mirrored), "client did not reuse the connection");
        let both = with(|s| (s.old, s.first_end) = (TcpState::Closing, ClosedBy::Both));
        assert_eq!((judge(&both), advised(&both).as_str()), (Cause::NoReuse, "closed, nobody asked"));
    }

    #[test]
    fn unknown() {
        // A response that ends with the connection.
        for ms in [1, 5_000] {
            let body = with(|s| {
                idle(s, ms);
                s.scan.body_until_close = true;
            });
            assert_eq!(judge(&body), Cause::Unknown);
            // An answer to a request that was never complete: nobody expects the connection to go on.
            let early = with(|s| {
                idle(s, ms);
                s.scan.request_incomplete = true;
            });
            assert_eq!(judge(&early), Cause::Unknown);
        }
        // Nobody closed it: it was aborted in silence.
        let abort = with(|s| {
            (s.old, s.first_end, s.fin_received, s.sk_err) = (TcpState::Established, ClosedBy::None, false, 103);
        });
        assert_eq!(judge(&abort), Cause::Unknown);
        assert_eq!(judge(&with(|s| s.payload_ns = None)), Cause::Unknown);
    }

    #[test]
    fn the_order_is_that_of_the_contract() {
        assert!(RULES.is_sorted_by_key(|(cause, _)| *cause));
    }

    /// Whatever else is true, what was not seen does not count as absent.
    #[test]
    fn the_unobserved_is_never_taken_for_absent() {
        let said = [None, UNOBSERVED, ABSENT, CLOSE, KEEP_ALIVE];
        for (asked, told) in said.iter().flat_map(|asked| said.iter().map(move |told| (*asked, *told))) {
            for (asked_version, told_version) in [
                (HttpVersion::V10, HttpVersion::V10),
                (HttpVersion::V10, HttpVersion::V11),
                (HttpVersion::V11, HttpVersion::V10),
                (HttpVersion::V11, HttpVersion::V11),
            ] {
                for (ms, lost) in [(1, (false, false)), (5_000, (false, false)), (1, (true, false)), (1, (false, true))]
                {
                    let socket = with(|s| {
                        idle(s, ms);
                        (s.scan.requests_lost, s.scan.responses_lost) = lost;
                        let http = s.http.as_mut().expect("HTTP");
                        (http.request_connection, http.response_connection) = (asked, told);
                        (http.request_version, http.response_version) = (Some(asked_version), Some(told_version));
                    });
                    let seen = |connection: Option<Connection>| !matches!(connection, None | UNOBSERVED);
                    match judge(&socket) {
                        Cause::RequestClose => assert_eq!(asked, CLOSE),
                        Cause::ResponseClose | Cause::Http10 => assert!(seen(asked) && seen(told)),
                        Cause::IdleTimeout | Cause::NoReuse => {
                            assert!(seen(asked) && seen(told) && lost == (false, false));
                        }
                        other => assert_eq!(other, Cause::Unknown),
                    }
                }
            }
        }
    }
}

/// Without a hook nothing may be said that only it could tell; and all the rest as before.
mod blind {
    use super::*;

    const RECEIVE: Blind = Blind { receive_reset: true, send_reset: false, exits: false };
    const SEND: Blind = Blind { receive_reset: false, send_reset: true, exits: false };
    const EXITS: Blind = Blind { receive_reset: false, send_reset: false, exits: true };
    const ALL: Blind = Blind { receive_reset: true, send_reset: true, exits: true };

    /// The server has closed, and the peer's FIN has not come.
    fn closing(change: impl FnOnce(&mut Socket)) -> Socket {
        with(|s| {
            (s.old, s.fin_received, s.shut_down) = (TcpState::FinWait1, false, true);
            change(s);
        })
    }

    /// No FIN and no RST was seen.
    fn open(old: TcpState, sk_err: u16) -> Socket {
        with(|s| (s.old, s.sk_err, s.fin_received, s.first_end, s.end_ns) = (old, sk_err, false, ClosedBy::None, None))
    }

    fn told(socket: &Socket) -> (ClosedBy, Option<How>, Cause) {
        let ending = ending(socket);
        (ending.closed_by, ending.how, cause(socket, &ending))
    }

    #[test]
    fn a_close_with_fins_is_told_as_ever() {
        for blind in [RECEIVE, SEND, ALL] {
            let closer = Some(crate::decode::Task {
                pid: 1,
                start_ns: 1,
                uid: 0,
                comm: [b'x'; 16],
                source: crate::event::Source::Close,
            });
            let socket = with(|s| (s.blind, s.closer) = (blind, closer));
            assert_eq!(told(&socket), (ClosedBy::Local, Some(How::Fin), Cause::NoReuse));
            assert_eq!(ending(&socket).fate, Fate::Known(Final::TimeWait, FinalSource::Fin));
        }
    }

    #[test]
    fn the_error_tells_a_reset_by_the_peer() {
        for (old, error) in [(TcpState::Established, errno::ECONNRESET), (TcpState::CloseWait, errno::EPIPE)] {
            let mut socket = open(old, error);
            socket.blind = ALL;
            assert_eq!(told(&socket), (ClosedBy::Remote, Some(How::Rst), Cause::ResetByPeer), "{old:?}");
        }
        // After `shutdown`, too.
        let socket = closing(|s| (s.sk_err, s.shut_down, s.blind) = (errno::ECONNRESET, false, ALL));
        assert_eq!(told(&socket), (ClosedBy::Local, Some(How::Rst), Cause::ResetByPeer));
    }

    #[test]
    fn after_close_the_error_does_not_tell_whose_reset_it_was() {
        let socket = closing(|s| (s.sk_err, s.blind) = (errno::ECONNRESET, RECEIVE));
        assert_eq!(told(&socket), (ClosedBy::Local, Some(How::Rst), Cause::Unknown));
        assert_eq!(ending(&socket).fate, Fate::Known(Final::Reset, FinalSource::State));
        let unsent = closing(|s| (s.sk_err, s.blind, s.first_end) = (errno::ECONNRESET, RECEIVE, ClosedBy::None));
        assert_eq!(told(&unsent), (ClosedBy::Unobserved, Some(How::Rst), Cause::Unknown));
        // The hook tells.
        let seen = closing(|s| (s.sk_err, s.blind) = (errno::ECONNRESET, SEND));
        assert_eq!(told(&seen).2, Cause::ResetByPeer);
        let ours = closing(|s| (s.sk_err, s.blind, s.rst_sent) = (errno::ECONNRESET, SEND, true));
        assert_eq!(told(&ours).2, Cause::ResetByLocal);
    }

    #[test]
    fn a_connection_that_was_refused() {
        let mut socket = open(TcpState::SynSent, errno::ECONNREFUSED);
        socket.blind = RECEIVE;
        (socket.rx_bytes, socket.tx_bytes, socket.http) = (0, 0, None);
        assert_eq!(told(&socket), (ClosedBy::Unobserved, Some(How::Unobserved), Cause::Unknown));
        assert_eq!(ending(&socket).fate, Fate::Known(Final::Unknown, FinalSource::Inferred));
        // The application gave up: that needs no hook.
        socket.sk_err = 0;
        assert_eq!(told(&socket), (ClosedBy::None, None, Cause::Unused));
    }

    #[test]
    fn an_abort_may_have_sent_a_reset() {
        let mut socket = open(TcpState::Established, errno::ECONNABORTED);
        socket.blind = SEND;
        assert_eq!(told(&socket), (ClosedBy::Unobserved, Some(How::Unobserved), Cause::Unknown));
        // Its segment was seen to leave.
        socket.first_end = ClosedBy::Local;
        assert_eq!(told(&socket).0, ClosedBy::Local);
        // EHOSTUNREACH in FIN_WAIT2.
        let probe = closing(|s| (s.old, s.sk_err, s.blind) = (TcpState::FinWait2, 113, SEND));
        assert_eq!(told(&probe), (ClosedBy::Local, Some(How::Unobserved), Cause::Unknown));
        // A time-out is told by its own error.
        let mut timed_out = open(TcpState::Established, errno::ETIMEDOUT);
        timed_out.blind = ALL;
        assert_eq!(told(&timed_out).1, Some(How::Timeout));
    }

    #[test]
    fn a_local_close_by_nobody_may_be_an_exit() {
        let nobody = with(|s| s.blind = EXITS);
        assert_eq!(told(&nobody), (ClosedBy::Local, Some(How::Fin), Cause::Unknown));
        assert_eq!(told(&with(|s| (s.blind, s.closed_by_exit) = (EXITS, true))).2, Cause::ProcessExit);
        // Nor is it where tracer made the close.
        assert_eq!(told(&with(|s| (s.closed_in_walk, s.closer) = (true, None))).2, Cause::Unknown);
        assert_eq!(told(&with(|s| (s.blind, s.first_end) = (EXITS, ClosedBy::Remote))).2, Cause::NoReuse);
        assert_eq!(told(&with(|s| s.blind = RECEIVE)).2, Cause::NoReuse);
    }
}
