/* Executes the tile instructions of x86 (AMX) on processors that do not have them.
 *
 * A handler of SIGILL decodes the instruction that the processor refused, does what Intel's manual
 * says it does on tiles that belong to the thread, and steps over it. For tests only: an
 * instruction costs a signal, some microseconds.
 *
 * Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18
 * (palette 1: 8 tiles of at most 16 rows of 64 bytes) and volume 2, LDTILECFG to TILEZERO.
 * What the manual answers with #UD reaches the handler that was installed before, as any other
 * illegal instruction does; what it answers with #GP becomes SIGSEGV, as in Linux.
 */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, CONFIG_BYTES = 64 };

enum instruction {
    LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED,
    TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD, TDPBF16PS, TDPFP16PS, INSTRUCTIONS
};

/* In the order of the enumeration; the Python side reads them. */
static const char *const names[INSTRUCTIONS] = {
    "ldtilecfg", "sttilecfg", "tilerelease", "tilezero", "tileloadd", "tileloaddt1", "tilestored",
    "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud", "tdpbf16ps", "tdpfp16ps",
};

struct state {
    uint8_t palette, start_row;
    uint16_t colsb[TILES];
    uint8_t rows[TILES];
    uint8_t tile[TILES][ROWS][ROW_BYTES];
};

struct operands {
    enum instruction instruction;
    int reg, rm, vvvv;     /* tile numbers */
    uint8_t *base;         /* of a memory operand */
    int64_t stride;        /* bytes from one row to the next */
    unsigned length;       /* of the instruction */
};

enum outcome { DONE, UNDEFINED, PROTECTION };

static __thread struct state state;
static struct sigaction previous;
static atomic_ulong counts[INSTRUCTIONS];

const char *amx_emulator_name(int instruction) {
    return instruction >= 0 && instruction < INSTRUCTIONS ? names[instruction] : NULL;
}

unsigned long amx_emulator_count(int instruction) { return atomic_load(&counts[instruction]); }

/* Prefix (0 none, 1 66h, 2 F3h, 3 F2h) of a VEX instruction in map 0F38. */
static int identify(uint8_t opcode, int prefix, uint8_t modrm) {
    const int memory = modrm >> 6 != 3, reg = modrm >> 3 & 7;
    switch (opcode) {
    case 0x49:
        if (memory) {
            if (reg != 0) return -1;
            return prefix == 0 ? LDTILECFG : prefix == 1 ? STTILECFG : -1;
        }
        if (prefix == 0) return modrm == 0xC0 ? TILERELEASE : -1;
        return prefix == 3 && (modrm & 7) == 0 ? TILEZERO : -1;
    case 0x4B: {
        static const int by_prefix[4] = {-1, TILELOADDT1, TILESTORED, TILELOADD};
        /* A tile in memory is addressed through a SIB byte, and nothing else. */
        return memory && (modrm & 7) == 4 ? by_prefix[prefix] : -1;
    }
    case 0x5C: {
        static const int by_prefix[4] = {-1, -1, TDPBF16PS, TDPFP16PS};
        return memory ? -1 : by_prefix[prefix];
    }
    case 0x5E: {
        static const int by_prefix[4] = {TDPBUUD, TDPBUSD, TDPBSUD, TDPBSSD};
        return memory ? -1 : by_prefix[prefix];
    }
    default:
        return -1;
    }
}

static uint64_t read_register(const ucontext_t *context, int number) {
    static const int order[16] = {
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
        REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
    };
    return (uint64_t)context->uc_mcontext.gregs[order[number]];
}

static int32_t read_int32(const uint8_t *at) {
    int32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* Whether the instruction at the thread's program counter is one of ours. */
static int decode(const ucontext_t *context, struct operands *out) {
    const uint8_t *const code = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2) return 0; /* VEX, map 0F38 */
    if (code[2] & 0x84) return 0;                           /* W0, 128 */
    const int high_reg = !(code[1] & 0x80), high_index = !(code[1] & 0x40);
    const int high_base = !(code[1] & 0x20), vvvv = ~code[2] >> 3 & 15;
    const uint8_t modrm = code[4];
    const int found = identify(code[3], code[2] & 3, modrm);
    if (found < 0) return 0;
    out->instruction = (enum instruction)found;
    out->reg = modrm >> 3 & 7;
    out->rm = modrm & 7;
    out->vvvv = vvvv;
    out->length = 5;
    out->base = NULL;
    out->stride = 0;
    const int product = found >= TDPBSSD;
    /* There are eight tiles, and only products have a third operand. */
    if (high_reg || (product ? vvvv > 7 || high_base : vvvv != 0)) return 0;
    if (modrm >> 6 == 3) return 1;

    const uint8_t *at = code + 5;
    const int mode = modrm >> 6;
    int base = out->rm | high_base << 3, none = 0;
    uint64_t address = 0;
    if (out->rm == 4) {
        const uint8_t sib = *at++;
        const int index = (sib >> 3 & 7) | high_index << 3;
        const int64_t scaled =
            index == 4 ? 0 : (int64_t)(read_register(context, index) << (sib >> 6));
        base = (sib & 7) | high_base << 3;
        none = (sib & 7) == 5 && mode == 0;
        /* The index of a tile's address is the stride, that of a configuration an index. */
        if (found == LDTILECFG || found == STTILECFG)
            address += (uint64_t)scaled;
        else
            out->stride = scaled;
    } else if (out->rm == 5 && mode == 0) {
        none = 2; /* relative to the next instruction */
    }
    int64_t displacement = 0;
    if (mode == 1) {
        displacement = (int8_t)*at++;
    } else if (mode == 2 || none) {
        displacement = read_int32(at);
        at += 4;
    }
    out->length = (unsigned)(at - code);
    if (none == 2)
        address += (uint64_t)(uintptr_t)at;
    else if (!none)
        address += read_register(context, base);
    out->base = (uint8_t *)(uintptr_t)(address + (uint64_t)displacement);
    return 1;
}

static int valid(int tile) { return state.palette == 1 && state.rows[tile] && state.colsb[tile]; }

static enum outcome load_configuration(const uint8_t *from) {
    uint8_t bytes[CONFIG_BYTES];
    memcpy(bytes, from, sizeof bytes);
    if (bytes[0] > 1) return PROTECTION;
    struct state fresh;
    memset(&fresh, 0, sizeof fresh);
    if (bytes[0] == 1) {
        fresh.palette = 1;
        fresh.start_row = bytes[1];
        for (int i = 2; i < 16; ++i)
            if (bytes[i]) return PROTECTION;
        for (int i = 16 + 2 * TILES; i < 48; ++i)
            if (bytes[i]) return PROTECTION;
        for (int i = 48 + TILES; i < CONFIG_BYTES; ++i)
            if (bytes[i]) return PROTECTION;
        for (int i = 0; i < TILES; ++i) {
            memcpy(&fresh.colsb[i], bytes + 16 + 2 * i, sizeof fresh.colsb[i]);
            fresh.rows[i] = bytes[48 + i];
            if (fresh.colsb[i] > ROW_BYTES || fresh.rows[i] > ROWS) return PROTECTION;
            if (!fresh.colsb[i] != !fresh.rows[i]) return PROTECTION;
        }
    }
    state = fresh;
    return DONE;
}

static void store_configuration(uint8_t *to) {
    uint8_t bytes[CONFIG_BYTES] = {0};
    if (state.palette) {
        bytes[0] = state.palette;
        bytes[1] = state.start_row;
        memcpy(bytes + 16, state.colsb, sizeof state.colsb);
        memcpy(bytes + 48, state.rows, sizeof state.rows);
    }
    memcpy(to, bytes, sizeof bytes);
}

static void load_tile(const struct operands *o) {
    const int tile = o->reg;
    uint8_t fresh[ROWS][ROW_BYTES] = {{0}};
    memcpy(fresh, state.tile[tile], (size_t)state.start_row * ROW_BYTES);
    for (int row = state.start_row; row < state.rows[tile]; ++row)
        memcpy(fresh[row], o->base + row * o->stride, state.colsb[tile]);
    memcpy(state.tile[tile], fresh, sizeof fresh);
    state.start_row = 0;
}

static void store_tile(const struct operands *o) {
    for (int row = state.start_row; row < state.rows[o->reg]; ++row)
        memcpy(o->base + row * o->stride, state.tile[o->reg][row], state.colsb[o->reg]);
    state.start_row = 0;
}

static void byte_products(const struct operands *o, int left_signed, int right_signed) {
    const int rows = state.rows[o->reg], columns = state.colsb[o->reg] / 4;
    const int groups = state.colsb[o->rm] / 4;
    for (int m = 0; m < rows; ++m) {
        uint32_t sums[ROW_BYTES / 4];
        memcpy(sums, state.tile[o->reg][m], sizeof sums);
        for (int k = 0; k < groups; ++k) {
            const uint8_t *const left = state.tile[o->rm][m] + 4 * k;
            const uint8_t *const right = state.tile[o->vvvv][k];
            for (int n = 0; n < columns; ++n)
                for (int j = 0; j < 4; ++j) {
                    const int32_t a = left_signed ? (int8_t)left[j] : left[j];
                    const uint8_t byte = right[4 * n + j];
                    sums[n] += (uint32_t)(a * (right_signed ? (int8_t)byte : byte));
                }
        }
        memcpy(state.tile[o->reg][m], sums, (size_t)columns * 4);
        memset(state.tile[o->reg][m] + columns * 4, 0, (size_t)(ROW_BYTES - columns * 4));
    }
    memset(state.tile[o->reg][rows], 0, (size_t)(ROWS - rows) * ROW_BYTES);
    state.start_row = 0;
}

static float flushed(float value) {
    return fpclassify(value) == FP_SUBNORMAL ? copysignf(0.0f, value) : value;
}

static float from_bfloat16(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return flushed(value); /* denormals are zeros */
}

static float from_float16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value;
    if (exponent == 31)
        value = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        value = ldexpf((float)fraction, -24); /* denormals are kept: they are normal float32 */
    else
        value = ldexpf((float)(1024 + fraction), exponent - 25);
    return bits & 0x8000 ? -value : value;
}

/* Sums of the even and of the odd products, fused, rounded to nearest even; denormals are zeros
 * going in and coming out. A handler of Linux starts with the default rounding mode. */
static void half_products(const struct operands *o, float (*widen)(uint16_t)) {
    const int rows = state.rows[o->reg], columns = state.colsb[o->reg] / 4;
    const int pairs = state.colsb[o->rm] / 4;
    for (int m = 0; m < rows; ++m) {
        float even[ROW_BYTES / 4] = {0}, odd[ROW_BYTES / 4] = {0}, sums[ROW_BYTES / 4];
        uint16_t left[ROW_BYTES / 2], right[ROW_BYTES / 2];
        memcpy(left, state.tile[o->rm][m], sizeof left);
        memcpy(sums, state.tile[o->reg][m], sizeof sums);
        for (int k = 0; k < pairs; ++k) {
            memcpy(right, state.tile[o->vvvv][k], sizeof right);
            for (int n = 0; n < columns; ++n) {
                even[n] = flushed(fmaf(widen(left[2 * k]), widen(right[2 * n]), even[n]));
                odd[n] = flushed(fmaf(widen(left[2 * k + 1]), widen(right[2 * n + 1]), odd[n]));
            }
        }
        for (int n = 0; n < columns; ++n)
            sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
        memcpy(state.tile[o->reg][m], sums, (size_t)columns * 4);
        memset(state.tile[o->reg][m] + columns * 4, 0, (size_t)(ROW_BYTES - columns * 4));
    }
    memset(state.tile[o->reg][rows], 0, (size_t)(ROWS - rows) * ROW_BYTES);
    state.start_row = 0;
}

/* The shapes that a product demands: [rows, 4 groups] x [groups, 4 columns] -> [rows, columns]. */
static int fits(const struct operands *o) {
    const int sums = o->reg, left = o->rm, right = o->vvvv;
    if (sums == left || sums == right || left == right) return 0;
    if (!valid(sums) || !valid(left) || !valid(right)) return 0;
    if (state.colsb[sums] % 4 || state.colsb[left] % 4 || state.colsb[right] % 4) return 0;
    return state.rows[sums] == state.rows[left] && state.colsb[sums] == state.colsb[right] &&
           state.colsb[left] / 4 == state.rows[right];
}

static enum outcome execute(const struct operands *o) {
    switch (o->instruction) {
    case LDTILECFG:
        return load_configuration(o->base);
    case STTILECFG:
        store_configuration(o->base);
        return DONE;
    case TILERELEASE:
        memset(&state, 0, sizeof state);
        return DONE;
    case TILEZERO:
        if (!valid(o->reg)) return UNDEFINED;
        memset(state.tile[o->reg], 0, sizeof state.tile[o->reg]);
        state.start_row = 0;
        return DONE;
    case TILELOADD:
    case TILELOADDT1:
    case TILESTORED:
        if (!valid(o->reg) || state.start_row >= state.rows[o->reg]) return UNDEFINED;
        if (o->instruction == TILESTORED)
            store_tile(o);
        else
            load_tile(o);
        return DONE;
    default:
        if (!fits(o)) return UNDEFINED;
        switch (o->instruction) {
        case TDPBF16PS:
            half_products(o, from_bfloat16);
            break;
        case TDPFP16PS:
            half_products(o, from_float16);
            break;
        default:
            byte_products(o, o->instruction == TDPBSSD || o->instruction == TDPBSUD,
                          o->instruction == TDPBSSD || o->instruction == TDPBUSD);
        }
        return DONE;
    }
}

static void pass_on(int signal, siginfo_t *info, void *context) {
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {
        sigaction(SIGILL, &previous, NULL); /* the instruction is tried again, and ends us */
    }
}

static void complain(const char *name, const char *what) {
    char text[160];
    const int length = snprintf(text, sizeof text, "amx emulator: %s: %s\n", name, what);
    if (write(STDERR_FILENO, text, (size_t)length) < 0) return;
}

static void on_illegal(int signal, siginfo_t *info, void *opaque) {
    ucontext_t *const context = opaque;
    struct operands operands;
    if (!decode(context, &operands)) {
        pass_on(signal, info, opaque);
        return;
    }
    switch (execute(&operands)) {
    case DONE:
        atomic_fetch_add(&counts[operands.instruction], 1);
        context->uc_mcontext.gregs[REG_RIP] += operands.length;
        return;
    case UNDEFINED:
        complain(names[operands.instruction], "tiles that are not configured or do not fit (#UD)");
        pass_on(signal, info, opaque);
        return;
    case PROTECTION:
        complain(names[operands.instruction], "a configuration that palette 1 forbids (#GP)");
        raise(SIGSEGV);
        return;
    }
}

/* Install the handler; 0, or -1 with errno. */
int amx_emulator_install(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_illegal;
    /* Not deferred: a fault of the handler itself must not hide behind a blocked signal. */
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGILL, &action, &previous);
}

int amx_emulator_remove(void) { return sigaction(SIGILL, &previous, NULL); }
