//! START HERE. The two-tier cache (and, with an empty store, the pooled one): which token is
//! where, and when it moves. The walk of a token:
//!
//! `append` checks the input and reserves every page it will need; new rows go to the **tail** (or
//! the **sinks**, or, in a long append, straight to the store); `migrate` takes whole batches of
//! the oldest tail tokens, encode.zig packs them into pages of the **store**, or of the **warm**
//! tier before it; attend.zig walks sinks, store, warm tier and tail with the kernels, on the
//! packed bytes, merging with a running softmax;
//! eviction, `trim` and `clear` give pages back to the **pool**.
//!
//! The state depends on the token stream alone, however it was cut into appends (and, where tokens
//! were taken back, on that: docs/architecture.md). An operation happens wholly or not at all.
//! Called by abi.zig and inspect.zig; calls append.zig, evict.zig,
//! tier.zig, encode.zig, pool.zig.
const std = @import("std");
const assert = std.debug.assert;
const append_file = @import("append.zig");
const encode = @import("encode.zig");
const evict = @import("evict.zig");
const format = @import("format.zig");
const input_file = @import("input.zig");
const Mapping = @import("mapping.zig").Mapping;
const message = @import("message.zig");
const pool_file = @import("pool.zig");
const rotate = @import("rotate.zig");
const sync = @import("sync.zig");
const tier_file = @import("tier.zig");
const Append = append_file.Append;
const Config = @import("config.zig").Config;
const Input = input_file.Input;
const Kept = @import("kept.zig").Kept;
const Pool = pool_file.Pool;
const Side = format.Side;
const Change = tier_file.Change;
const Tier = tier_file.Tier;

pub const TierName = enum(usize) { sinks = 0, store = 1, warm = 2, tail = 3 };
pub const tier_count = 4;

pub const Cache = struct {
    gpa: std.mem.Allocator,
    pool: *Pool,
    config: Config,
    /// Readers share it, an append has it alone.
    lock: sync.RwLock = .{},
    /// In the order of their positions, and of every reduction: sinks, store, warm, tail.
    tiers: [tier_count]Tier,
    /// Position of the token that will be appended next.
    next: u64 = 0,
    /// First position that eviction has not taken (sinks aside).
    begin: u64 = 0,
    /// Positions below this left the tail. It never falls but by `trim`, `clear` and `convert`.
    boundary: u64 = 0,
    /// Positions below this are in the store: all below `boundary` if there is no warm tier. It
    /// falls with `boundary`.
    cold: u64 = 0,
    evicted: u64 = 0,
    migrated: u64 = 0,
    /// Tokens that stay behind the window, and which never leave; null if there are none.
    kept: ?*Kept = null,
    /// The files that pages may lie in, if the cache was loaded from some.
    mapping: ?*Mapping = null,
    /// Rows on their way into a page: (64, dim) f32, for keys and values in turn; with a warm tier
    /// as much again, for a page that they pass through.
    rows: []align(64) f32,
    /// Largest magnitudes that every tier can hold.
    key_limit: f32,
    value_limit: f32,

    pub fn create(gpa: std.mem.Allocator, pool: *Pool, config: Config) error{OutOfMemory}!*Cache {
        const cache = try gpa.create(Cache);
        errdefer gpa.destroy(cache);
        const tiers = config.tiers();
        cache.* = .{
            .gpa = gpa,
            .pool = pool,
            .config = config,
            .tiers = tiers,
            .rows = try gpa.alignedAlloc(f32, .@"64", rows_floats(&config)),
            .key_limit = limit_of(&config, &tiers, .key),
            .value_limit = limit_of(&config, &tiers, .value),
        };
        pool.retain();
        return cache;
    }

    pub fn rows_floats(config: *const Config) usize {
        const dim = @max(config.head_dim, config.value_dim);
        const rows = format.page_tokens * std.mem.alignForward(usize, dim, format.group);
        return rows * if (config.has_warm()) @as(usize, 2) else 1;
    }

    /// The largest magnitude that every tier can hold, whichever way it takes.
    pub fn limit_of(config: *const Config, tiers: []const Tier, comptime side: Side) f32 {
        var limit: f32 = std.math.floatMax(f32);
        for (tiers, 0..) |*tier, t| {
            // always empty
            if (t == @backingInt(TierName.store) and config.kind == .pooled) continue;
            if (t == @backingInt(TierName.warm) and !config.has_warm()) continue;
            limit = @min(limit, input_file.limit_of(tier.half(side)));
        }
        if (!config.has_warm()) return limit;
        const store = tiers[@backingInt(TierName.store)].half(side);
        const warm = tiers[@backingInt(TierName.warm)].half(side);
        return @min(limit, input_file.limit_through(warm, store));
    }

    pub fn destroy(cache: *Cache) void {
        cache.drop_contents();
        cache.pool.release();
        cache.gpa.free(cache.rows);
        cache.gpa.destroy(cache);
    }

    pub fn tier_of(cache: *Cache, name: TierName) *Tier {
        return &cache.tiers[@backingInt(name)];
    }

    /// The order in which several caches are locked.
    pub fn before(_: void, a: *Cache, b: *Cache) bool {
        return @intFromPtr(a) < @intFromPtr(b);
    }

    pub fn kept_runs(cache: *const Cache) []Tier {
        return if (cache.kept) |kept| kept.runs else &.{};
    }

    pub fn replace_kept(cache: *Cache, kept: ?*Kept) void {
        if (cache.kept) |old| old.release(cache.gpa, cache.pool);
        cache.kept = kept;
    }

    pub fn run_count(cache: *const Cache) usize {
        return tier_count + cache.kept_runs().len;
    }

    /// All that is held, in the order of positions: sinks, what is kept behind the window, store,
    /// warm, tail.
    pub fn run(cache: *const Cache, index: usize) *const Tier {
        const kept = cache.kept_runs();
        if (index == 0) return &cache.tiers[0];
        return if (index <= kept.len) &kept[index - 1] else &cache.tiers[index - kept.len];
    }

    /// The tier that eviction takes from.
    pub fn body(cache: *const Cache) *const Tier {
        return &cache.tiers[@backingInt(cache.body_name())];
    }

    pub fn body_name(cache: *const Cache) TierName {
        return if (cache.config.kind == .two_tier) .store else .tail;
    }

    pub fn len(cache: *const Cache) u64 {
        var tokens: u64 = 0;
        for (0..cache.run_count()) |i| tokens += cache.run(i).tokens();
        return tokens;
    }

    // ---- append ----

    /// Where everything is after an append.
    pub const Plan = struct { next: u64, begin: u64, boundary: u64, cold: u64 };

    /// The tier rule: batches aligned to position 0 migrate as soon as `tail_length` newer tokens
    /// exist, and go on to the store, by pages of 64, as soon as `warm_length` newer ones have
    /// migrated; the oldest tokens beyond `max_tokens` go, sinks never.
    pub fn plan(cache: *const Cache, tokens: u64) Plan {
        const config = &cache.config;
        const next = cache.next + tokens;
        const rule = rule_at(config, next);
        var after: Plan = .{
            .next = next,
            .begin = cache.begin,
            .boundary = @max(cache.boundary, rule.boundary),
            .cold = 0,
        };
        after.cold = if (config.has_warm())
            @max(cache.cold, cold_at(config, after.boundary))
        else
            after.boundary;
        if (next > config.max_tokens) {
            after.begin = @max(after.begin, next - (config.max_tokens - config.sink_tokens));
        }
        return after;
    }

    pub const Rule = struct { boundary: u64, cold: u64 };

    /// Where the tiers of a stream of `next` tokens meet that was never trimmed.
    pub fn rule_at(config: *const Config, next: u64) Rule {
        if (config.kind == .pooled or next < config.tail_length) return .{
            .boundary = 0,
            .cold = 0,
        };
        const batches = (next - config.tail_length) / config.migration_batch;
        const boundary = boundary_at(config, batches * config.migration_batch);
        return .{
            .boundary = boundary,
            .cold = if (config.has_warm()) cold_at(config, boundary) else boundary,
        };
    }

    fn cold_at(config: *const Config, boundary: u64) u64 {
        const settled = (boundary -| config.warm_length) / format.page_tokens * format.page_tokens;
        return boundary_at(config, settled);
    }

    /// Sinks never migrate: a boundary among them is none.
    fn boundary_at(config: *const Config, position: u64) u64 {
        return if (position > config.sink_tokens) position else 0;
    }

    pub fn bounds(cache: *const Cache, after: Plan) [tier_count][2]u64 {
        const sinks_end = @min(cache.config.sink_tokens, after.next);
        const start = @min(@max(after.begin, sinks_end), after.next);
        const store_end = @max(start, @min(after.cold, after.next));
        const warm_end = @max(store_end, @min(after.boundary, after.next));
        return .{
            .{ 0, sinks_end },
            .{ start, store_end },
            .{ store_end, warm_end },
            .{ warm_end, after.next },
        };
    }

    /// Appends `tokens` tokens, or changes nothing.
    pub fn append(cache: *Cache, keys: Input, values: Input, tokens: u64) append_file.Error!void {
        cache.lock.lock();
        defer cache.lock.unlock();
        const tokens_max = evict.append_tokens_max(cache);
        if (tokens > tokens_max) return append_file.in_pieces(cache, keys, values, tokens);
        var pending: Append = try .reserve(cache, keys, values, tokens);
        pending.commit();
    }

    // ---- reading back ----

    /// De-quantized, un-rotated rows of `tokens` live tokens, oldest first, from index `first` on,
    /// into (token, head, dim).
    pub fn get(
        cache: *Cache,
        first: u64,
        tokens: u64,
        keys: [*]f32,
        values: [*]f32,
    ) error{InvalidArgument}!void {
        cache.lock.lockShared();
        defer cache.lock.unlockShared();
        const live = cache.len();
        if (first > live or tokens > live - first) {
            message.set(
                "tokens [{d}, {d}) asked of {d} live tokens",
                .{ first, first +| tokens, live },
            );
            return error.InvalidArgument;
        }
        const config = &cache.config;
        var index: u64 = 0;
        for (0..cache.run_count()) |r| {
            const tier = cache.run(r);
            defer index += tier.tokens();
            const from = @max(first, index);
            const to = @min(first + tokens, index + tier.tokens());
            var i = from;
            while (i < to) : (i += 1) for (0..tier.heads) |head| {
                const row: usize = @intCast((i - first) * config.num_kv_heads + head);
                const position = tier.start + (i - index);
                read_back(
                    tier,
                    .key,
                    position,
                    head,
                    keys[row * config.head_dim ..][0..config.head_dim],
                );
                read_back(
                    tier,
                    .value,
                    position,
                    head,
                    values[row * config.value_dim ..][0..config.value_dim],
                );
            };
        }
    }

    fn read_back(
        tier: *const Tier,
        comptime side: Side,
        position: u64,
        head: usize,
        target: []f32,
    ) void {
        const half = if (side == .key) tier.key else tier.value;
        const page = tier.page_at(position / tier.tokens_per_page, head);
        const base = if (side == .key) tier.keys_of(page) else tier.values_of(page);
        var row: [Config.dim_max]f32 = undefined;
        const stored = row[0..half.dim_stored()];
        encode.decode_token(half, side, base, @intCast(position % tier.tokens_per_page), stored);
        if (half.rotated) rotate.rotate(stored);
        @memcpy(target, stored[0..target.len]);
    }

    // ---- taking back ----

    /// Removes the newest `tokens` live tokens; returns how many there were to remove. What stays
    /// keeps its bits and its tier.
    pub fn trim(cache: *Cache, tokens: u64) error{OutOfMemory}!u64 {
        cache.lock.lock();
        defer cache.lock.unlock();
        const removed = @min(tokens, cache.len());
        if (removed == 0) return 0;
        var rest = removed;
        var i = cache.run_count();
        while (true) {
            i -= 1;
            const oldest = cache.run(i);
            if (rest <= oldest.tokens()) {
                try cache.cut(oldest.end - rest);
                return removed;
            }
            rest -= oldest.tokens();
        }
    }

    /// Removes the tokens from position `length` on.
    pub fn trim_to(cache: *Cache, length: u64) error{ InvalidArgument, OutOfMemory }!void {
        cache.lock.lock();
        defer cache.lock.unlock();
        try cache.check_cut(length);
        try cache.cut(length);
    }

    pub fn clear(cache: *Cache) error{OutOfMemory}!void {
        cache.lock.lock();
        defer cache.lock.unlock();
        const empty: Plan = .{ .next = 0, .begin = 0, .boundary = 0, .cold = 0 };
        cache.move(empty) catch return error.OutOfMemory;
        cache.replace_kept(null);
        cache.evicted = 0;
        cache.migrated = 0;
        cache.replace_mapping(null);
    }

    /// Takes back the tokens from position `length` on. What stays keeps its bits and its tier.
    fn cut(cache: *Cache, length: u64) error{OutOfMemory}!void {
        const kept = try evict.after_cut(cache, length);
        errdefer if (kept) |k| k.release(cache.gpa, cache.pool);
        cache.move(.{
            .next = length,
            .begin = @min(cache.begin, length),
            .boundary = boundary_at(&cache.config, @min(cache.boundary, length)),
            .cold = boundary_at(&cache.config, @min(cache.cold, length)),
        }) catch return error.OutOfMemory; // nothing is added, so no pool is full
        cache.replace_kept(kept);
    }

    /// Moves all bounds at once, or changes nothing. Pages that come are zeroed.
    pub fn move(cache: *Cache, after: Plan) pool_file.Error!void {
        const moved = cache.bounds(after);
        var changes: [tier_count]Change = undefined;
        var reserved: usize = 0;
        errdefer for (0..reserved) |t| cache.tiers[t].cancel(cache.gpa, cache.pool, &changes[t]);
        for (&cache.tiers, moved, &changes) |*tier, bound, *change| {
            change.* = try tier.reserve(cache.gpa, cache.pool, bound[0], bound[1], bound[1]);
            reserved += 1;
        }
        for (&cache.tiers, &changes) |*tier, *change| tier.commit(cache.gpa, cache.pool, change);
        cache.next = after.next;
        cache.begin = after.begin;
        cache.boundary = after.boundary;
        cache.cold = after.cold;
    }

    // ---- sharing ----

    /// The length of `fork` that is all there is.
    pub const whole = std.math.maxInt(u64);

    /// Another cache with the first `length` tokens of the stream. Both hold the same pages until
    /// one of them has to change one.
    pub fn fork(cache: *Cache, length: u64) error{ InvalidArgument, OutOfMemory }!*Cache {
        const other = try create(cache.gpa, cache.pool, cache.config);
        errdefer other.destroy();
        {
            cache.lock.lockShared();
            defer cache.lock.unlockShared();
            if (length != whole) try cache.check_cut(length);
            other.share_from(cache);
        }
        if (length < other.next) try other.cut(length);
        return other;
    }

    /// Makes this cache what `saved`, a fork of it, is. Cannot fail halfway: nothing is copied.
    pub fn restore(cache: *Cache, saved: *Cache) error{InvalidArgument}!void {
        if (saved == cache) return;
        if (saved.pool != cache.pool or !std.meta.eql(saved.config, cache.config)) {
            message.set("saved: expected a fork of this cache", .{});
            return error.InvalidArgument;
        }
        var state: Cache = undefined;
        {
            // One lock at a time: two caches may be restored from each other.
            saved.lock.lockShared();
            defer saved.lock.unlockShared();
            state.share_from(saved);
        }
        cache.lock.lock();
        defer cache.lock.unlock();
        cache.drop_contents();
        cache.take_from(&state);
    }

    /// Gives up all that `take_from` takes.
    pub fn drop_contents(cache: *Cache) void {
        for (&cache.tiers) |*tier| tier.deinit(cache.gpa, cache.pool);
        cache.replace_kept(null);
        cache.replace_mapping(null);
    }

    /// Takes all that `restore` changes, and owns it.
    pub fn take_from(cache: *Cache, source: *const Cache) void {
        cache.tiers = source.tiers;
        cache.next = source.next;
        cache.begin = source.begin;
        cache.boundary = source.boundary;
        cache.cold = source.cold;
        cache.evicted = source.evicted;
        cache.migrated = source.migrated;
        cache.kept = source.kept;
        @atomicStore(?*Mapping, &cache.mapping, source.mapping, .release);
    }

    pub fn share_from(cache: *Cache, source: *const Cache) void {
        cache.take_from(source);
        for (&cache.tiers, &source.tiers) |*tier, *shared| tier.* = shared.share();
        if (cache.kept) |kept| _ = kept.retain();
        if (cache.mapping) |mapping| _ = mapping.retain();
    }

    /// Refuses a length of the stream that would need tokens which were evicted.
    fn check_cut(cache: *const Cache, length: u64) error{InvalidArgument}!void {
        const first = @min(@max(cache.begin, cache.tiers[0].end), cache.next);
        if (length >= first and length <= cache.next) return;
        for (0..cache.run_count()) |i| {
            const held = cache.run(i);
            if (length >= held.start and length <= held.end and held.tokens() > 0) return;
        }
        if (length == 0) return;
        message.set(
            "length is {d}; expected the end of tokens that are held, as {d} to {d}",
            .{ length, first, cache.next },
        );
        return error.InvalidArgument;
    }

    // ---- files ----

    /// Makes sure that bytes of files are what was saved, before anything is made of them.
    pub fn verify(cache: *Cache) error{Damaged}!void {
        if (@atomicLoad(?*Mapping, &cache.mapping, .acquire) == null) return;
        cache.lock.lockShared();
        const held = if (cache.mapping) |mapping| mapping.retain() else null;
        cache.lock.unlockShared();
        const mapping = held orelse return;
        defer mapping.release();
        try mapping.verify();
    }

    pub fn replace_mapping(cache: *Cache, mapping: ?*Mapping) void {
        const old = cache.mapping;
        @atomicStore(?*Mapping, &cache.mapping, mapping, .release);
        if (old) |m| m.release();
    }
};
