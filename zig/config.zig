//! The checked form of `abi.CacheConfig`: every field in range, every derived layout at hand.
//! Called by abi.zig (`check`) and cache.zig (`tiers`).
const std = @import("std");
const abi = @import("abi.zig");
const format = @import("format.zig");
const message = @import("message.zig");
const Half = format.Half;
const Tier = @import("tier.zig").Tier;

pub const Config = struct {
    kind: abi.CacheKind,
    num_kv_heads: u32,
    head_dim: u32,
    value_dim: u32,
    tail_format: format.Format,
    key_format: format.Format,
    value_format: format.Format,
    max_tokens: u64,
    tail_length: u64,
    migration_batch: u64,
    sink_tokens: u64,
    tokens_per_block: u64,
    rotation: abi.Rotation,
    warm_format: format.Format,
    warm_length: u64,

    /// Bounds that keep every product of sizes far from overflow.
    pub const dim_max = 4096;
    pub const heads_max = 4096;
    pub const tokens_max = 1 << 40;
    pub const block_tokens_max = 1 << 16;

    pub fn check(from: abi.CacheConfig) error{InvalidArgument}!Config {
        try in_range("num_kv_heads", from.num_kv_heads, 1, heads_max);
        try in_range("head_dim", from.head_dim, 1, dim_max);
        try in_range("value_dim", from.value_dim, 0, dim_max);
        try in_range("max_tokens", from.max_tokens, 1, tokens_max);
        const config: Config = .{
            .kind = try choice(abi.CacheKind, "kind", from.kind),
            .num_kv_heads = from.num_kv_heads,
            .head_dim = from.head_dim,
            .value_dim = if (from.value_dim == 0) from.head_dim else from.value_dim,
            .tail_format = try choice(format.Format, "tail_format", from.tail_format),
            .key_format = try choice(format.Format, "key_format", from.key_format),
            .value_format = try choice(format.Format, "value_format", from.value_format),
            .max_tokens = from.max_tokens,
            .tail_length = from.tail_length,
            .migration_batch = from.migration_batch,
            .sink_tokens = from.sink_tokens,
            .tokens_per_block = from.tokens_per_block,
            .rotation = try choice(abi.Rotation, "rotation", from.rotation),
            .warm_format = try choice(format.Format, "warm_format", from.warm_format),
            .warm_length = from.warm_length,
        };
        if (config.half(config.tail_format, 1, 16).quantized()) {
            message.set("tail_format is {t}; the tail is f32, f16 or bf16", .{config.tail_format});
            return error.InvalidArgument;
        }
        try in_range("sink_tokens", from.sink_tokens, 0, tokens_max);
        switch (config.kind) {
            .two_tier => try config.check_two_tier(),
            .pooled => {
                try in_range("tokens_per_block", from.tokens_per_block, 1, block_tokens_max);
                try in_range("warm_length", from.warm_length, 0, 0);
                if (from.sink_tokens >= from.max_tokens) {
                    message.set(
                        "max_tokens is {d}; it must exceed sink_tokens, {d}",
                        .{ from.max_tokens, from.sink_tokens },
                    );
                    return error.InvalidArgument;
                }
            },
        }
        return config;
    }

    fn check_two_tier(config: *const Config) error{InvalidArgument}!void {
        try in_range("tail_length", config.tail_length, 0, tokens_max);
        try in_range("migration_batch", config.migration_batch, 1, tokens_max);
        try in_range("warm_length", config.warm_length, 0, tokens_max);
        if (is_centred(config.warm_format)) {
            const text = "warm_format is {t}; expected one whose tokens do not share an offset";
            message.set(text, .{config.warm_format});
            return error.InvalidArgument;
        }
        const least = config.sink_tokens + config.tail_length + config.migration_batch +
            if (config.has_warm()) config.warm_length + format.page_tokens else 0;
        if (least <= config.max_tokens) return;
        const text = "max_tokens is {d}; sink_tokens + tail_length + migration_batch, and " ++
            "warm_length + 64 if there is a warm tier, are {d}";
        message.set(text, .{ config.max_tokens, least });
        return error.InvalidArgument;
    }

    pub fn has_warm(config: *const Config) bool {
        return config.warm_length > 0;
    }

    fn warm_max(config: *const Config) u64 {
        return if (config.has_warm()) config.warm_length + format.page_tokens - 1 else 0;
    }

    fn tail_max(config: *const Config) u64 {
        return config.tail_length + config.migration_batch - 1;
    }

    /// The most tokens that warm tier and tail hold together, before they leave for a store.
    pub fn recent_max(config: *const Config) u64 {
        return if (config.kind == .pooled) 0 else config.warm_max() + config.tail_max();
    }

    /// Refuses more tokens than the rules leave in these tiers.
    pub fn check_recent(config: *const Config, warm: u64, tail: u64) error{InvalidArgument}!void {
        if (config.kind == .pooled) return;
        if (warm <= config.warm_max() and tail <= config.tail_max()) return;
        const text = "{d} tokens in the warm tier, {d} in the tail; they have {d} and {d} at most";
        message.set(text, .{ warm, tail, config.warm_max(), config.tail_max() });
        return error.InvalidArgument;
    }

    pub fn half(config: *const Config, f: format.Format, dim: u32, slots: u32) Half {
        var result: Half = .{ .format = f, .dim = dim, .slots = slots, .rotated = false };
        result.rotated = result.quantized() and switch (config.rotation) {
            .auto => f != .q8,
            .on => true,
            .off => false,
        };
        return result;
    }

    fn key_half(config: *const Config, f: format.Format, slots: u32) Half {
        var result = config.half(f, config.head_dim, slots);
        result.centred = is_centred(f);
        return result;
    }

    fn is_centred(f: format.Format) bool {
        return switch (f) {
            inline else => |tag| format.all[@backingInt(tag)].quantized and
                format.all[@backingInt(tag)].half_levels,
        };
    }

    /// Sinks, store, warm and tail, empty.
    pub fn tiers(config: *const Config) [4]Tier {
        const sinks: u32 = @intCast(std.math.clamp(config.sink_tokens, 1, format.page_tokens));
        const tail: u32 = switch (config.kind) {
            .two_tier => format.page_tokens,
            .pooled => @intCast(config.tokens_per_block),
        };
        return .{
            config.tier(config.tail_format, config.tail_format, sinks),
            config.tier(config.key_format, config.value_format, format.page_tokens),
            config.tier(config.warm_format, config.warm_format, format.page_tokens),
            config.tier(config.tail_format, config.tail_format, tail),
        };
    }

    fn tier(
        config: *const Config,
        key: format.Format,
        value: format.Format,
        tokens_per_page: u32,
    ) Tier {
        const slots = std.mem.alignForward(u32, tokens_per_page, format.block_slots);
        return .{
            .key = config.key_half(key, slots),
            .value = config.half(value, config.value_dim, slots),
            .heads = config.num_kv_heads,
            .tokens_per_page = tokens_per_page,
        };
    }
};

fn in_range(name: []const u8, value: u64, least: u64, most: u64) error{InvalidArgument}!void {
    if (value >= least and value <= most) return;
    message.set("{s} is {d}; expected {d} to {d}", .{ name, value, least, most });
    return error.InvalidArgument;
}

/// A caller's number as an enum, or a clear refusal.
pub fn choice(comptime E: type, name: []const u8, value: u32) error{InvalidArgument}!E {
    inline for (@typeInfo(E).@"enum".field_values) |known| {
        if (value == known) return @fromBackingInt(value);
    }
    message.set("{s} is {d}, which is not one of its values", .{ name, value });
    return error.InvalidArgument;
}

test "sizes out of range are refused with a message" {
    try std.testing.expectError(error.InvalidArgument, Config.check(.{ .head_dim = 0 }));
    try std.testing.expectError(error.InvalidArgument, Config.check(.{ .tail_format = 4 }));
    try std.testing.expectError(error.InvalidArgument, Config.check(.{ .key_format = 99 }));
    try std.testing.expectError(error.InvalidArgument, Config.check(.{ .max_tokens = 300 }));
    _ = try Config.check(.{ .max_tokens = 320 });
}
