"""The pool and both evictions written as plainly as possible: dictionaries, `min`, one key at a time."""

from foreroute.residency.states import FREE, LOADING, PINNED, READY


class NaiveScores:
    """What a key is worth: LRU when decay is None, else LFU with that decay."""

    def __init__(self, num_keys, decay):
        self.decay = decay
        self.now = 0
        self.use = 2.0**32
        self.score = dict.fromkeys(range(num_keys), 0)

    def touch(self, keys):
        self.now += 1
        for key in keys:
            self.score[key] = self.now if self.decay is None else self.score[key] + int(self.use)

    def tick(self):
        if self.decay is not None:
            self.use /= self.decay

    def coldest(self, keys):
        return min(keys, key=lambda key: (self.score[key], key), default=None)


class NaivePool:
    """What `Residency` promises, with no thought of speed. Says which slots are free, not which of them is taken."""

    def __init__(self, num_slots, num_keys, staging_slots, deferred_slots, decay):
        self.num_slots, self.num_keys, self.staging_slots = num_slots, num_keys, staging_slots
        self.deferred_slots = deferred_slots
        self.scores = NaiveScores(num_keys, decay)
        self.state = dict.fromkeys(range(num_keys), FREE)
        self.slot = {}
        self.deferred = set()
        self.prefetched = []  # READY ones in the order in which they became so or were guessed again
        self.free = set(range(num_slots))
        self.borrowed = set()
        self.evictions = self.used = self.wasted = 0

    def in_state(self, *states):
        return [key for key, state in self.state.items() if state in states]

    def prefetched_ready(self):
        return [key for key in self.prefetched if self.state[key] == READY]

    def hot(self):
        return [key for key in self.in_state(READY) if key not in self.prefetched]

    def evict(self, key):
        self.evictions += 1
        if key in self.prefetched:
            self.wasted += 1
            self.prefetched.remove(key)
        self.state[key] = FREE
        return self.slot.pop(key)

    def insert(self, key, slot, victim):
        """The pool says which slot the key got; the model says whose that has to be, None for a free one."""
        if victim is None:
            self.free.remove(slot)
        else:
            assert slot == self.evict(victim)
        self.state[key] = LOADING
        self.slot[key] = slot

    def unstage(self, key):
        if key in self.prefetched:
            self.prefetched.remove(key)
            self.used += 1

    def can_demand(self, keys):
        misses = [key for key in keys if self.state[key] == FREE]
        room = len(self.free) + len([key for key in self.in_state(READY) if key not in keys])
        return len(misses) <= room

    def demand(self, keys, misses):
        self.scores.touch(keys)
        for key in keys:
            self.unstage(key)
            if self.state[key] == READY:
                self.state[key] = PINNED
        for key, slot in misses:
            victim = None
            if not self.free:
                victim = self.scores.coldest(self.hot())
                if victim is None:
                    victim = self.prefetched_ready()[0]
            self.insert(key, slot, victim)

    def prefetch(self, keys, loads):
        """Returns how many loads there have to be."""
        absent = [key for key in keys if self.state[key] == FREE]
        self.renew(keys)
        for done, key in enumerate(absent):
            old = [other for other in self.prefetched_ready() if other not in keys]
            cold = self.scores.coldest([other for other in self.hot() if other not in keys])
            may_grow = len(self.prefetched) < self.staging_slots
            if may_grow and self.free:
                victim = None
            elif may_grow and cold is not None:
                victim = cold
            elif old:
                victim = old[0]
            else:
                return done
            if done == len(loads):
                return done + 1
            assert loads[done][0] == key
            self.insert(key, loads[done][1], victim)
            self.prefetched.append(key)
        return len(absent)

    def defer(self, keys, loads):
        """Returns how many loads there have to be."""
        self.scores.touch(keys)
        for key in keys:
            if self.state[key] == LOADING and key in self.prefetched and len(self.deferred) < self.deferred_slots:
                self.unstage(key)
                self.deferred.add(key)
        absent = [key for key in keys if self.state[key] == FREE]
        for done, key in enumerate(absent):
            victim = None if self.free else self.scores.coldest(self.hot())
            is_full = len(self.deferred) >= self.deferred_slots
            if is_full or (not self.free and victim is None):
                return done
            if done == len(loads):
                return done + 1
            assert loads[done][0] == key
            self.insert(key, loads[done][1], victim)
            self.deferred.add(key)
        return len(absent)

    def renew(self, keys):
        for key in keys:
            if key in self.prefetched_ready():
                self.prefetched.remove(key)
                self.prefetched.append(key)

    def loaded(self, key):
        self.state[key] = READY
        self.deferred.discard(key)
        if key in self.prefetched:
            self.prefetched.remove(key)
            self.prefetched.append(key)

    def pin(self, key):
        if key in self.prefetched:
            self.scores.touch([key])
        self.unstage(key)
        self.state[key] = PINNED

    def release(self, keys):
        for key in keys:
            self.state[key] = READY

    def evict_now(self, keys):
        for key in keys:
            self.free.add(self.evict(key))

    def drop_loading(self, key):
        self.state[key] = FREE
        self.deferred.discard(key)
        self.free.add(self.slot.pop(key))
        if key in self.prefetched:
            self.prefetched.remove(key)

    def borrow(self, num_slots, slots):
        """Returns how many slots there have to be."""
        room = len(self.free) + len(self.in_state(READY))
        for slot in slots:
            if self.free:
                self.free.remove(slot)
            else:
                victim = (self.prefetched_ready() or [self.scores.coldest(self.hot())])[0]
                assert slot == self.evict(victim)
            self.borrowed.add(slot)
        return min(room, num_slots)

    def give_back(self, slots):
        for slot in slots:
            self.borrowed.remove(slot)
            self.free.add(slot)
