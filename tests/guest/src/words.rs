//! The words of the kernel command line: `key=value`, the last of a key wins.

/// The whole command line.
#[derive(Clone, Copy)]
pub struct Words(pub &'static str);

/// A virtio-mmio device named by `virtio_mmio.device=SIZE@ADDRESS:IRQ`.
#[derive(Clone, Copy)]
pub struct Slot {
    pub address: u64,
    pub irq: u32,
}

impl Words {
    /// The value of `key`, if the word is there.
    pub fn get(&self, key: &str) -> Option<&'static str> {
        self.values(key).last()
    }

    /// The number that is the value of `key`: decimal or 0x, with K, M or G for powers of 1024.
    pub fn number(&self, key: &str, default: u64) -> u64 {
        self.get(key).and_then(number).unwrap_or(default)
    }

    /// Whether `key` has the value `value`.
    pub fn is(&self, key: &str, value: &str) -> bool {
        self.get(key) == Some(value)
    }

    /// The virtio-mmio devices, in the order of their words.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + use<> {
        self.values("virtio_mmio.device").filter_map(|value| {
            let mut parts = value.split_once('@')?.1.split(':');
            let address = number(parts.next()?)?;
            Some(Slot { address, irq: number(parts.next()?)? as u32 })
        })
    }

    fn values<'k>(&self, key: &'k str) -> impl Iterator<Item = &'static str> + use<'k> {
        self.0.split_ascii_whitespace().filter_map(move |word| word.strip_prefix(key)?.strip_prefix('='))
    }
}

fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    value.checked_shl(shift)
}
