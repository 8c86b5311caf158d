//! Guest memory: pieces taken from what is free above the image and never given back, and device registers.
//!
//! Devices read and write this memory while we do, so all access is by a MOV of our own and no reference into it is made.
//! Addresses are physical and virtual at once: the first 4 GiB are mapped one to one.

use core::arch::asm;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    safe static image_end: u8;
}

static FREE: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);

/// Declares what lies between the image and `end` free.
pub fn start(end: u64) {
    FREE.store(&raw const image_end as u64, Ordering::Relaxed);
    END.store(end, Ordering::Relaxed);
}

/// Takes `len` zeroed bytes, page-aligned. Panics when memory is used up.
pub fn take(len: u64) -> Dma {
    let dma = take_as_is(len);
    dma.fill(0);
    dma
}

/// Takes `len` bytes, page-aligned, with whatever is in them, and touches none. Panics when memory is used up.
pub fn take_as_is(len: u64) -> Dma {
    let address = FREE.fetch_add(len.next_multiple_of(4096), Ordering::Relaxed);
    assert!(len <= END.load(Ordering::Relaxed).saturating_sub(address), "out of memory: {len} bytes more");
    Dma { address, len }
}

/// Bytes that `take` can still hand out.
pub fn free() -> u64 {
    END.load(Ordering::Relaxed).saturating_sub(FREE.load(Ordering::Relaxed))
}

/// Takes a table of `len` times `value` that no device knows of.
pub fn table<T: Copy>(len: usize, value: T) -> &'static mut [T] {
    const { assert!(align_of::<T>() <= 4096) };
    let first = take_as_is((len * size_of::<T>()) as u64).address as *mut T;
    for index in 0..len {
        // SAFETY: inside the piece just taken, which is aligned to a page.
        unsafe { first.add(index).write(value) };
    }
    // SAFETY: all of it is written, and `take_as_is` never hands it out again.
    unsafe { core::slice::from_raw_parts_mut(first, len) }
}

/// A value that one plain MOV reads or writes: what the emulators of KVM decode, aligned or not.
pub trait Word: Copy {
    /// # Safety
    /// The address is mapped.
    unsafe fn load(address: u64) -> Self;
    /// # Safety
    /// The address is mapped, and is a device's or nobody's.
    unsafe fn store(self, address: u64);
}

macro_rules! word {
    ($type:ty, $class:ident, $modifier:literal) => {
        impl Word for $type {
            #[inline]
            unsafe fn load(address: u64) -> Self {
                let value;
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(concat!("mov {value", $modifier, "}, [{address}]"), value = out($class) value,
                        address = in(reg) address, options(nostack, preserves_flags));
                }
                value
            }

            #[inline]
            unsafe fn store(self, address: u64) {
                // SAFETY: the caller's promise.
                unsafe {
                    asm!(concat!("mov [{address}], {value", $modifier, "}"), value = in($class) self,
                        address = in(reg) address, options(nostack, preserves_flags));
                }
            }
        }
    };
}

word!(u8, reg_byte, "");
word!(u16, reg, ":x");
word!(u32, reg, ":e");
word!(u64, reg, ":r");

/// A piece of memory that a device may know of.
#[derive(Clone, Copy)]
pub struct Dma {
    address: u64,
    len: u64,
}

impl Dma {
    /// The address of the byte at `offset`, which may lie anywhere: it is for the device.
    pub fn at(&self, offset: u64) -> u64 {
        self.address.wrapping_add(offset)
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// The piece of `len` bytes at `offset`. Panics when it reaches out of this one.
    pub fn piece(&self, offset: u64, len: u64) -> Dma {
        assert!(offset <= self.len && len <= self.len - offset);
        Dma { address: self.address + offset, len }
    }

    #[inline]
    fn read<T: Word>(&self, offset: u64) -> T {
        assert!(offset < self.len && self.len - offset >= size_of::<T>() as u64);
        // SAFETY: inside a piece that `take` handed out.
        unsafe { T::load(self.address + offset) }
    }

    #[inline]
    fn write<T: Word>(&self, offset: u64, value: T) {
        assert!(offset < self.len && self.len - offset >= size_of::<T>() as u64);
        // SAFETY: as `read`; no reference into the piece exists.
        unsafe { value.store(self.address + offset) }
    }

    pub fn read8(&self, offset: u64) -> u8 {
        self.read(offset)
    }

    pub fn read16(&self, offset: u64) -> u16 {
        self.read(offset)
    }

    pub fn read32(&self, offset: u64) -> u32 {
        self.read(offset)
    }

    pub fn read64(&self, offset: u64) -> u64 {
        self.read(offset)
    }

    pub fn write8(&self, offset: u64, value: u8) {
        self.write(offset, value);
    }

    pub fn write16(&self, offset: u64, value: u16) {
        self.write(offset, value);
    }

    pub fn write32(&self, offset: u64, value: u32) {
        self.write(offset, value);
    }

    pub fn write64(&self, offset: u64, value: u64) {
        self.write(offset, value);
    }

    /// Fills the whole piece with one byte. For when no device has it.
    pub fn fill(&self, byte: u8) {
        // SAFETY: inside a piece that `take` handed out; no reference into it exists.
        unsafe { ptr::write_bytes(self.address as *mut u8, byte, self.len as usize) };
    }

    /// Copies `len` bytes at `from_offset` of `from` to `offset`. Panics when they reach out of either.
    pub fn copy(&self, offset: u64, from: &Dma, from_offset: u64, len: u64) {
        let (to, from) = (self.piece(offset, len), from.piece(from_offset, len));
        // SAFETY: inside pieces that `take` handed out; no reference into them exists.
        unsafe { ptr::copy(from.address as *const u8, to.address as *mut u8, len as usize) };
    }

    /// A number that changes, very probably, when any byte of the piece does. The length is a multiple of 8.
    pub fn digest(&self) -> u64 {
        (0..self.len / 8)
            .fold(0, |sum: u64, i| (sum ^ self.read64(8 * i)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
    }
}

/// The registers of a device, or memory that is not ours to take: any address of the first 4 GiB.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Registers {
    base: u64,
}

impl Registers {
    pub fn new(base: u64) -> Self {
        Registers { base }
    }

    pub fn base(&self) -> u64 {
        self.base
    }

    fn address(&self, offset: u64) -> u64 {
        let address = self.base + offset;
        assert!(address < 1 << 32, "address {address:#x} is not mapped");
        address
    }

    /// Reads a register of the width of `T`.
    pub fn read<T: Word>(&self, offset: u64) -> T {
        // SAFETY: mapped; a read of a register or of memory changes nothing that Rust knows of.
        unsafe { T::load(self.address(offset)) }
    }

    /// Writes a register of the width of `T`.
    pub fn write<T: Word>(&self, offset: u64, value: T) {
        // SAFETY: mapped; callers name device registers, or low memory that nothing else uses.
        unsafe { value.store(self.address(offset)) }
    }

    pub fn read32(&self, offset: u64) -> u32 {
        self.read(offset)
    }

    pub fn write32(&self, offset: u64, value: u32) {
        self.write(offset, value);
    }
}

/// The four functions the compiler calls for itself.
mod for_the_compiler {
    use core::arch::asm;

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        // SAFETY: the caller owns both ranges.
        unsafe {
            asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _, options(nostack, preserves_flags))
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= len {
            // SAFETY: the caller owns both ranges, and going up is right.
            return unsafe { memcpy(to, from, len) };
        }
        // SAFETY: the caller owns both ranges; they overlap so that going down is right.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
                inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _, inout("rcx") len => _, options(nostack));
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
        // SAFETY: the caller owns the range.
        unsafe {
            asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") len => _, options(nostack, preserves_flags))
        };
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
        for i in 0..len {
            // SAFETY: the caller owns both ranges.
            let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
            if x != y {
                return i32::from(x) - i32::from(y);
            }
        }
        0
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
        // SAFETY: as `memcmp`.
        unsafe { memcmp(a, b, len) }
    }
}
