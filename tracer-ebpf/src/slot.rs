//! Where the state of a socket is: in a slot of an array, or in the socket's own storage.
//!
//! To make storage is the largest single cost of a short connection; slots are there from the beginning. Each CPU hands out the cookies
//! of sockets one after the other, so a cookie says which slot is its socket's, and that is free unless one that came long before is
//! still open. Connections that last would take one after the other: so the walk over open files moves those that are idle into
//! storage. There, too, is what finds its slot taken, and what was seen before its first transition.
//!
//! A slot is its socket's if its tag says so, and no lock is taken: what a tag becomes is settled by compare-and-exchange. An end that
//! is kept from the programs leaves its slot taken for good; that costs no more than storage for those that come to it.

use aya_ebpf::bindings::BPF_SK_STORAGE_GET_F_CREATE;
use aya_ebpf::btf_maps::{Array, HashMap, SkStorage};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get};
use aya_ebpf::macros::btf_map;
use tracer_ebpf::{SLOT_BYTES, counter, role};

use crate::conn::{self, Conn, clear_words, copy_words};
use crate::scan::exchange_u64;
use crate::sock;

/// The tag, the state, and when the tag became what it is if that is [`IDLE`] or [`ENDED`]; where among these bytes, user space
/// says, which knows how the kernel aligns the first slot: `Conn` is to begin 8 bytes behind a cache line, as it does in storage.
#[repr(C)]
struct Bytes([u64; SLOT_BYTES as usize / 8]);
const _: () = assert!(64 + size_of::<Conn>() + 8 <= SLOT_BYTES as usize);

/// Of a state.
const WORDS: usize = size_of::<Conn>() / 8;

/// As many as user space asks for, a power of two.
#[btf_map]
static SLOTS: Array<Bytes, 1> = Array::new();
#[btf_map]
static SOCKETS: SkStorage<Conn> = SkStorage::new();
/// Cookies of the sockets whose state is in storage, where a walk over open files cannot look ([`sock::config_files_trusted`]). How many
/// find room user space says.
#[btf_map]
static STORED: HashMap<u64, u8, 1> = HashMap::new();
/// Not 0: that has been full.
#[btf_map]
static MORE_STORED: Array<u32, 1> = Array::new();

/// Beside the cookie in a tag: the slot is being cleared for that socket.
const CLAIMED: u64 = 1 << 61;
/// No program has asked for that socket's state since a walk passed by.
const IDLE: u64 = 1 << 62;
/// That socket has ended; without a cookie: the slot was left. Nobody uses it for [`GRACE_NS`].
const ENDED: u64 = 1 << 63;
/// Cookies have none of these bits, but for those that are made while another one is being made: they count down from the highest.
const COOKIES: u32 = 61;

/// How long a slot is not used again, nanoseconds: a program that has found it before may still write to it. Programs take
/// microseconds; this is for one that was preempted, or whose virtual CPU does not run.
const GRACE_NS: u64 = 250_000_000;
/// Likewise between two walks, of which the first marks a socket as idle, and the second moves it: by then no program is at work
/// that has found it before.
const IDLE_NS: u64 = 500_000_000;

#[derive(Clone, Copy)]
struct Slot {
    tag: *mut u64,
    conn: *mut Conn,
    since_ns: *mut u64,
}

/// The slot that is, or would be, that of a socket.
#[inline(always)]
fn slot(cookie: u64) -> Option<Slot> {
    if cookie.wrapping_sub(1) >> COOKIES != 0 {
        return None;
    }
    let bytes = SLOTS.get_ptr_mut(cookie as u32 & sock::config_slot_mask())?.cast::<u8>();
    // SAFETY: the state, with a word before and one behind it, lies within the slot: the verifier sees where user space put it.
    unsafe {
        let conn = bytes.add(sock::config_slot_at() as usize);
        Some(Slot { tag: conn.sub(8).cast(), conn: conn.cast(), since_ns: conn.add(size_of::<Conn>()).cast() })
    }
}

impl Slot {
    #[inline(always)]
    fn tag(self) -> u64 {
        // SAFETY: an aligned word of the map.
        unsafe { self.tag.read_volatile() }
    }

    /// Makes the tag `new` if it is `old`, and answers whether it was.
    #[inline(always)]
    fn retag(self, old: u64, new: u64) -> bool {
        self.exchange(old, new) == old
    }

    /// The same, but answers what it was.
    #[inline(always)]
    fn exchange(self, old: u64, new: u64) -> u64 {
        let mut was = old;
        // SAFETY: a compare-and-exchange of an aligned word of the map, whose registers these are.
        unsafe {
            core::arch::asm!(
                "r0 = cmpxchg_64({tag} + 0, r0, {new})",
                tag = in(reg) self.tag,
                new = in(reg) new,
                inout("r0") was,
                options(nostack)
            );
        }
        was
    }

    /// The tag, for a program that will use the state if it is this socket's: if that was idle, it no longer is.
    #[inline(always)]
    fn tag_for(self, cookie: u64) -> u64 {
        let tag = self.tag();
        if tag != cookie | IDLE {
            return tag;
        }
        // If not, then another program was faster, or it has left.
        let tag = self.exchange(tag, cookie);
        if tag == cookie | IDLE { cookie } else { tag }
    }

    /// Whether a slot with this tag can be used.
    #[inline(always)]
    fn is_free(self, tag: u64, now: u64) -> bool {
        // SAFETY: an aligned word of the map.
        tag == 0 || (tag & ENDED != 0 && now.saturating_sub(unsafe { self.since_ns.read_volatile() }) > GRACE_NS)
    }

    /// Makes a slot that the caller has claimed that of its socket, with a state of zeroes.
    ///
    /// # Safety
    /// As for [`Slot::state`].
    #[inline(always)]
    unsafe fn clear<'a>(self, cookie: u64) -> Option<&'a mut Conn> {
        // SAFETY: by the caller's word; a state is so many words.
        unsafe {
            clear_words::<WORDS>(self.conn.cast());
            // An exchange comes behind everything that was written before.
            exchange_u64(self.tag, cookie);
            self.state()
        }
    }

    /// The state.
    ///
    /// # Safety
    /// The slot is that of the caller's socket. It stays so until the program ends, and longer. A program on another CPU may hold it,
    /// too: [`Conn`] says who writes what.
    #[inline(always)]
    unsafe fn state<'a>(self) -> Option<&'a mut Conn> {
        // SAFETY: by the caller's word.
        unsafe { self.conn.as_mut() }
    }
}

/// The state of a socket, if it has one and has not ended.
///
/// # Safety
/// `sk` is a BTF pointer to a `struct sock`, or `__sk_buff.sk` checked against NULL, and `cookie` is its own.
#[inline(always)]
pub(crate) unsafe fn get<'a>(sk: *mut c_void, cookie: u64) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word.
    unsafe { find(sk, cookie, |slot| slot.tag_for(cookie)) }
}

/// The same, but an idle socket stays so: for the walks. `trusted`: helpers take this one.
///
/// # Safety
/// As for [`get`].
#[inline(always)]
pub(crate) unsafe fn peek<'a>(sk: *mut c_void, cookie: u64, trusted: bool) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word. Only a walk moves what is idle, and there is one at a time.
    unsafe {
        if trusted {
            return find(sk, cookie, |slot| slot.tag() & !IDLE);
        }
        let slot = slot(cookie)?;
        if slot.tag() == cookie { slot.state() } else { None }
    }
}

/// # Safety
/// As for [`get`]; a slot with the tag that is read stays that socket's.
#[inline(always)]
unsafe fn find<'a>(sk: *mut c_void, cookie: u64, tag: impl Fn(Slot) -> u64) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word.
    unsafe {
        if let Some(slot) = slot(cookie) {
            let tag = tag(slot);
            if tag == cookie {
                return slot.state();
            }
            if tag == cookie | ENDED {
                return None;
            }
        }
        storage(sk, 0)
    }
}

/// The state of a socket that is older than the programs, or that is seen before its first transition, made now if it had none
/// and [`conn::ends_pass`].
///
/// # Safety
/// As for [`get`].
#[inline(always)]
pub(crate) unsafe fn get_or_create<'a>(sk: *mut c_void, cookie: u64) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word.
    unsafe {
        let known = get(sk, cookie);
        if known.is_some() || !conn::ends_pass(sk) || has_ended(cookie) {
            return known;
        }
        in_storage_unless_claimed(sk, cookie)
    }
}

/// The state of a socket in its storage, made now; but if its slot was claimed for it meanwhile, on another CPU, the state there.
///
/// # Safety
/// As for [`get`].
#[inline(always)]
unsafe fn in_storage_unless_claimed<'a>(sk: *mut c_void, cookie: u64) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word.
    unsafe {
        let made = in_storage(sk);
        note_stored(cookie);
        if let Some(slot) = slot(cookie) {
            // Either who claimed it has seen what was made here, or this sees the claim. (To exchange a tag for itself is a look
            // that cannot come too early.)
            let mut tag = slot.exchange(cookie, cookie);
            // It takes some 50 ns until it is settled which of the two it will be.
            for _ in 0..8 {
                if tag == cookie | CLAIMED {
                    tag = slot.exchange(cookie, cookie);
                }
            }
            if tag == cookie {
                return slot.state();
            }
            if tag == cookie | CLAIMED {
                // The other one was stopped. So this segment or transition is passed over, like one that was not seen.
                return None;
            }
        }
        made
    }
}

/// The state of a socket that is an open file, for the walk that finds it; made now, if it had none and [`conn::ends_pass`], as it
/// is older than the programs. Where helpers do not take such a socket ([`sock::config_files_trusted`]) only its slot is at hand: if
/// that is free, the state is made there, and if it is not, or if its state is in storage, there is none.
///
/// # Safety
/// As for [`get`].
#[inline(always)]
pub(crate) unsafe fn of_file<'a>(sk: *mut c_void, cookie: u64) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word; who has claimed a slot is alone with it.
    unsafe {
        if sock::config_files_trusted() {
            return get_or_create(sk, cookie);
        }
        let slot = slot(cookie)?;
        let tag = slot.tag_for(cookie);
        if tag == cookie {
            return slot.state();
        }
        let is_free = tag != cookie | ENDED && slot.is_free(tag, conn::now());
        if !is_free || is_stored(sk, cookie) || !conn::ends_pass(sk) || !slot.retag(tag, cookie | CLAIMED) {
            return None;
        }
        // It may have been put there meanwhile, before the claim was to be seen.
        if is_stored(sk, cookie) {
            slot.tag.write_volatile(0);
            return None;
        }
        slot.clear(cookie)
    }
}

/// Notes that a socket's state is in storage, if that will be asked.
#[inline(always)]
fn note_stored(cookie: u64) {
    if !sock::config_files_trusted()
        && STORED.insert(cookie, 0, 0).is_err()
        && let Some(more) = MORE_STORED.get_ptr_mut(0)
    {
        // SAFETY: an aligned word of the map.
        unsafe { more.write_volatile(1) };
    }
}

/// Whether a socket's state is, or may be, in storage, where [`note_stored`] is called. Others may have put something there, too.
///
/// # Safety
/// As for [`get`].
#[inline(always)]
unsafe fn is_stored(sk: *mut c_void, cookie: u64) -> bool {
    // SAFETY: by the caller's word; the value is not looked at.
    unsafe { STORED.get(cookie).is_some() || (MORE_STORED.get(0) != Some(&0) && sock::has_storage(sk)) }
}

/// The socket has no state any more.
#[inline(always)]
fn forget_stored(cookie: u64) {
    if !sock::config_files_trusted() {
        // It fails where there was nothing to forget.
        let _ = STORED.remove(cookie);
    }
}

/// The state of a socket at a transition, made now if it had none: in its slot, if that is free. ([`conn::ends_pass`] was asked
/// before.)
///
/// # Safety
/// `sk` is a BTF pointer to a `struct sock`, and `cookie` is its own; no other transition of this socket is at work.
#[inline(always)]
pub(crate) unsafe fn claim<'a>(sk: *mut c_void, cookie: u64, now: u64) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word; who has claimed a slot is alone with it.
    unsafe {
        if let Some(slot) = slot(cookie) {
            let tag = slot.tag_for(cookie);
            if tag == cookie {
                return slot.state();
            }
            if slot.is_free(tag, now) && slot.retag(tag, cookie | CLAIMED) {
                let known = stored(sk);
                if known.is_some() {
                    note_stored(cookie);
                    slot.tag.write_volatile(0);
                    return known;
                }
                return slot.clear(cookie);
            }
        }
        let known = stored(sk);
        if known.is_some() {
            note_stored(cookie);
            return known;
        }
        conn::count(counter::CROWDED);
        // The walk over open files may be claiming it at this moment.
        in_storage_unless_claimed(sk, cookie)
    }
}

/// The state of a socket whose slot is its own only if it is a client's.
///
/// # Safety
/// As for [`claim`].
#[inline(always)]
pub(crate) unsafe fn of_client<'a>(sk: *mut c_void, cookie: u64) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word.
    unsafe {
        if let Some(slot) = slot(cookie)
            && slot.tag_for(cookie) == cookie
            && (*slot.conn).role == role::CLIENT
        {
            return slot.state();
        }
        in_storage(sk)
    }
}

/// The state of a socket in its storage, made now if it had none there: for a socket whose cookie is not its own yet; or for the
/// walk over storage, so that it passes by a socket whose state is in a slot.
///
/// # Safety
/// As for [`get`].
#[inline(always)]
pub(crate) unsafe fn in_storage<'a>(sk: *mut c_void) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word.
    unsafe { storage(sk, u64::from(BPF_SK_STORAGE_GET_F_CREATE)) }
}

/// The state that a socket has in its storage. To ask for that is a call, which is spared where nobody has put anything there.
///
/// # Safety
/// `sk` is a BTF pointer to a `struct sock`.
#[inline(always)]
unsafe fn stored<'a>(sk: *mut c_void) -> Option<&'a mut Conn> {
    // SAFETY: by the caller's word.
    unsafe { if sock::has_storage(sk) { storage(sk, 0) } else { None } }
}

/// # Safety
/// As for [`get`].
#[inline(always)]
unsafe fn storage<'a>(sk: *mut c_void, flags: u64) -> Option<&'a mut Conn> {
    let map = (&raw const SOCKETS).cast_mut().cast();
    // SAFETY: by the caller's word; the helper answers NULL or a value that lives until the program ends, see `get`.
    unsafe { bpf_sk_storage_get(map, sk, core::ptr::null_mut(), flags).cast::<Conn>().as_mut() }
}

/// The socket has ended: its slot will be another's.
#[inline(always)]
pub(crate) fn end(cookie: u64, now: u64) {
    forget_stored(cookie);
    if let Some(slot) = slot(cookie)
        && slot.tag() & !IDLE == cookie
    {
        // SAFETY: aligned words of the map. A walk that marks it as idle at this moment does not move it.
        unsafe {
            slot.since_ns.write_volatile(now);
            exchange_u64(slot.tag, cookie | ENDED);
        }
    }
}

/// Whether the socket has ended, and its slot is not another's yet.
#[inline(always)]
pub(crate) fn has_ended(cookie: u64) -> bool {
    slot(cookie).is_some_and(|slot| slot.tag() == cookie | ENDED)
}

/// If the socket has ended, and its slot is not another's yet: that it does not become another's before [`end`] is called again.
#[inline(always)]
pub(crate) fn hold(cookie: u64) -> bool {
    slot(cookie).is_some_and(|slot| slot.tag() == cookie | ENDED && slot.retag(cookie | ENDED, cookie))
}

/// Forgets the state of a socket, if it has one.
///
/// # Safety
/// As for [`claim`].
#[inline(always)]
pub(crate) unsafe fn delete(sk: *mut c_void, cookie: u64) {
    if let Some(slot) = slot(cookie) {
        let tag = slot.tag_for(cookie);
        if tag & !ENDED == cookie {
            // SAFETY: an aligned word of the map.
            unsafe { slot.since_ns.write_volatile(conn::now()) };
            // A walk may mark it at this moment.
            if !slot.retag(tag, ENDED) {
                slot.retag(tag | IDLE, ENDED);
            }
        }
    }
    forget_stored(cookie);
    // SAFETY: by the caller's word. It fails where there was nothing to forget.
    unsafe {
        if sock::has_storage(sk) {
            bpf_sk_storage_delete((&raw const SOCKETS).cast_mut().cast(), sk);
        }
    }
}

/// A walk passes by a socket: if no program has asked for its state since the one before, that moves from its slot into storage.
///
/// # Safety
/// As for [`get`].
#[inline(always)]
pub(crate) unsafe fn pass_by(sk: *mut c_void, cookie: u64) {
    let Some(slot) = slot(cookie) else { return };
    let now = conn::now();
    // SAFETY: by the caller's word; aligned words of the map. A program that asks for the state takes the mark away before it
    // touches the state, so if the mark is there at the end, what was copied is what is in the slot.
    unsafe {
        let tag = slot.tag();
        if tag == cookie {
            slot.since_ns.write_volatile(now);
            slot.retag(cookie, cookie | IDLE);
        } else if tag == cookie | IDLE && now.saturating_sub(slot.since_ns.read_volatile()) >= IDLE_NS {
            slot.since_ns.write_volatile(now);
            let Some(conn) = in_storage(sk) else { return };
            copy_words::<WORDS>((&raw mut *conn).cast(), slot.conn.cast());
            let was = slot.exchange(tag, ENDED);
            if was != tag && was & !(IDLE | ENDED) == cookie {
                bpf_sk_storage_delete((&raw const SOCKETS).cast_mut().cast(), sk);
            }
        }
    }
}
