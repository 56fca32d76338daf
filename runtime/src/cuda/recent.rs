//! The last few things used.

/// At most `limit` values by key; the one used longest ago gives way.
#[derive(Debug)]
pub(super) struct Recent<K, V> {
    limit: usize,
    /// Least recently used first.
    entries: Vec<(K, V)>,
}

impl<K: PartialEq, V> Recent<K, V> {
    /// Empty.
    pub fn new(limit: usize) -> Self {
        Recent { limit: limit.max(1), entries: Vec::new() }
    }

    /// Takes the value of `key` out.
    pub fn take(&mut self, key: &K) -> Option<V> {
        let at = self.entries.iter().rposition(|(k, _)| k == key)?;
        Some(self.entries.remove(at).1)
    }

    /// Puts a value in as the last one used.
    pub fn put(&mut self, key: K, value: V) {
        let _ = self.take(&key);
        if self.entries.len() == self.limit {
            self.entries.remove(0);
        }
        self.entries.push((key, value));
    }

    /// The value used last.
    pub fn last(&self) -> Option<&V> {
        self.entries.last().map(|(_, v)| v)
    }

    /// Values.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.iter().map(|(_, v)| v)
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_gives_way() {
        let mut recent = Recent::new(2);
        recent.put(1, 'a');
        recent.put(2, 'b');
        let a = recent.take(&1).unwrap();
        recent.put(1, a);
        recent.put(3, 'c');
        assert_eq!(recent.values().copied().collect::<String>(), "ac");
        assert_eq!(recent.last(), Some(&'c'));
        assert_eq!(recent.take(&2), None);
        recent.put(3, 'd');
        assert_eq!(recent.values().copied().collect::<String>(), "ad");
        recent.clear();
        assert_eq!(recent.take(&3), None);
    }
}
