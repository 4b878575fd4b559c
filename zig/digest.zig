//! A hash of a cache's state. Called by abi.zig.
const std = @import("std");
const Cache = @import("cache.zig").Cache;
const evict = @import("evict.zig");
const format = @import("format.zig");
const spill = @import("spill.zig");
const Half = format.Half;
const Hash = std.hash.XxHash64;

/// Every bit that is stored of live tokens, their positions and tiers. Equal digests mean equal
/// states; dead slots of pages do not count.
pub fn digest(cache: *Cache) u64 {
    cache.lock.lockShared();
    defer cache.lock.unlockShared();
    var hash = Hash.init(0);
    hash_int(&hash, cache.next);
    hash_int(&hash, cache.boundary);
    if (cache.config.has_warm()) hash_int(&hash, cache.cold);
    for (evict.pins_of(cache)) |pin| {
        hash_int(&hash, pin.start);
        hash_int(&hash, pin.end);
    }
    for (0..cache.run_count()) |i| {
        const tier = cache.run(i);
        if (tier == cache.tier_of(.warm) and !cache.config.has_warm()) continue;
        hash_int(&hash, tier.start);
        hash_int(&hash, tier.end);
        for ([_]Half{ tier.key, tier.value }) |half| {
            hash_int(&hash, @backingInt(half.format));
            hash_int(&hash, half.dim);
            hash_int(&hash, @intFromBool(half.rotated));
        }
        var position = tier.start;
        while (position < tier.end) : (position += 1) for (0..tier.heads) |head| {
            const page = tier.page_at(position / tier.tokens_per_page, head);
            const slot: usize = @intCast(position % tier.tokens_per_page);
            hash_token(&hash, tier.key, .key, tier.keys_of(page), slot);
            hash_token(&hash, tier.value, .value, tier.values_of(page), slot);
        };
        spill.leave_all(tier, tier.start, tier.end);
    }
    return hash.final();
}

fn hash_int(hash: *Hash, x: u64) void {
    hash.update(&std.mem.toBytes(std.mem.nativeToLittle(u64, x)));
}

/// The stored bits of one token: its row, or its codes and scales.
fn hash_token(
    hash: *Hash,
    half: Half,
    comptime side: format.Side,
    base: [*]const u8,
    slot: usize,
) void {
    switch (half.format) {
        inline else => |tag| {
            const T = format.all[@backingInt(tag)];
            if (!T.quantized) {
                const bytes = half.row_bytes();
                return hash.update(base[slot * bytes ..][0..bytes]);
            }
            for (0..half.groups()) |g| {
                const size = @sizeOf(T.Scale);
                const at = (g * format.page_tokens + slot) * size;
                var codes: [format.group]u8 = undefined;
                for (&codes, 0..) |*code, i| code.* = T.get(side, base, slot, g * format.group + i);
                hash.update(half.scales(base)[at..][0..size]);
                hash.update(&codes);
            }
            if (half.centred) hash.update(half.offsets(base)[0..half.dim_stored()]);
        },
    }
}
