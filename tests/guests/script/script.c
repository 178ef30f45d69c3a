// A workflow that does what its input says: {"steps": [{"http": {…}}, {"sleep": 10}, …]}.
//
// Returns the list of the steps' results: {"status", "headers", "body", "base64"} of an `http`,
// {"code", "stdout", "stderr"} of an `exec`, a number of `now` and `random`, null of the rest. An effect's
// error is {"error": kind, "text": …}: interrupted, timed-out, denied, lost, failed.
//
// script.wat makes a component of it. Nothing is ever freed: a run is short, and its memory goes with it.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *at;
    uint32_t size;
} Text;

#define TEXT(literal) ((Text){literal, sizeof(literal) - 1})
#define HOST(name) __attribute__((import_module("host"), import_name(name))) extern

__attribute__((import_module("env"), import_name("realloc"))) extern void *take(void *, uint32_t, uint32_t, uint32_t);

// What the host gives and takes, as the component model's canonical ABI lays it out.

typedef struct {
    Text name, value;
} Header;

typedef struct {
    uint8_t failed;
    union {
        struct {
            uint16_t status;
            Header *headers;
            uint32_t header_count;
            Text body;
            uint8_t base64;
        } response;
        struct {
            int32_t code;
            Text out, err;
        } exit;
        struct {
            uint8_t kind;
            Text text;
        } error;
    };
} Answer;

HOST("http") void host_http(const char *, uint32_t, const char *, uint32_t, Header *, uint32_t, const char *, uint32_t,
                            uint32_t, uint32_t, Answer *);
HOST("exec") void host_exec(Text *, uint32_t, Header *, uint32_t, const char *, uint32_t, uint32_t, uint32_t, Answer *);
HOST("sleep") void host_sleep(uint64_t);
HOST("log") void host_log(uint32_t, const char *, uint32_t);
HOST("now") uint64_t host_now(void);
HOST("random") uint64_t host_random(void);
HOST("respond") void host_respond(const char *, uint32_t);
HOST("progress") void host_progress(uint32_t, uint32_t, const char *, uint32_t);

static void *allot(uint32_t size) {
    return take(NULL, 0, 8, size);
}

static bool equal(Text one, Text other) {
    if (one.size != other.size) return false;
    for (uint32_t i = 0; i < one.size; i++)
        if (one.at[i] != other.at[i]) return false;
    return true;
}

// What ends the run before its last step: its answer is then an error, with this reason.

typedef struct {
    uint32_t failed;
    Text text;
} Ended;

static Ended ended;

static void fail(Text reason) {
    if (!ended.failed) ended = (Ended){true, reason};
}

// JSON in. A number stays the text that it is.

typedef struct Value Value;
struct Value {
    char kind;  // one of n t f 0 " [ {
    Text text, name;
    Value *first, *next;
    uint32_t count;
};

typedef struct {
    const char *at, *end;
} Input;

static char peek(Input *in) {
    while (in->at < in->end && (*in->at == ' ' || *in->at == '\n' || *in->at == '\t' || *in->at == '\r')) in->at++;
    return in->at < in->end ? *in->at : 0;
}

static char *put_utf8(char *to, uint32_t code) {
    if (code < 0x80) {
        *to++ = code;
    } else if (code < 0x800) {
        *to++ = 0xc0 | code >> 6;
        *to++ = 0x80 | (code & 63);
    } else if (code < 0x10000) {
        *to++ = 0xe0 | code >> 12;
        *to++ = 0x80 | (code >> 6 & 63);
        *to++ = 0x80 | (code & 63);
    } else {
        *to++ = 0xf0 | code >> 18;
        *to++ = 0x80 | (code >> 12 & 63);
        *to++ = 0x80 | (code >> 6 & 63);
        *to++ = 0x80 | (code & 63);
    }
    return to;
}

static uint32_t read_hex(Input *in) {
    uint32_t code = 0;
    for (int i = 0; i < 4 && in->at < in->end; i++, in->at++)
        code = code << 4 | (*in->at <= '9' ? *in->at - '0' : (*in->at | 32) - 'a' + 10);
    return code;
}

static Text read_string(Input *in) {
    const char *begin = ++in->at;
    while (in->at < in->end && *in->at != '"') in->at += *in->at == '\\' ? 2 : 1;
    Input from = {begin, in->at++};
    char *text = allot(from.end - begin), *to = text;
    while (from.at < from.end) {
        char one = *from.at++;
        if (one != '\\') {
            *to++ = one;
            continue;
        }
        switch (one = *from.at++) {
        case 'n': *to++ = '\n'; break;
        case 't': *to++ = '\t'; break;
        case 'r': *to++ = '\r'; break;
        case 'b': *to++ = '\b'; break;
        case 'f': *to++ = '\f'; break;
        case 'u': {
            uint32_t code = read_hex(&from);
            if (code >= 0xd800 && code < 0xdc00 && from.end - from.at >= 6) {
                from.at += 2;  // a pair of surrogates is one character
                code = 0x10000 + ((code - 0xd800) << 10) + (read_hex(&from) - 0xdc00);
            }
            to = put_utf8(to, code);
            break;
        }
        default: *to++ = one;
        }
    }
    return (Text){text, to - text};
}

static Value *read_value(Input *in) {
    Value *value = allot(sizeof *value);
    *value = (Value){.kind = peek(in)};
    if (value->kind == '"') {
        value->text = read_string(in);
    } else if (value->kind == '[' || value->kind == '{') {
        char closing = value->kind == '[' ? ']' : '}';
        Value **last = &value->first;
        in->at++;
        while (peek(in) != closing && in->at < in->end) {
            Text name = {0};
            if (value->kind == '{') {
                peek(in);
                name = read_string(in);
                if (peek(in) == ':') in->at++;
            }
            *last = read_value(in);
            (*last)->name = name;
            last = &(*last)->next;
            value->count++;
            if (peek(in) == ',') in->at++;
        }
        in->at++;
    } else {
        value->text.at = in->at;
        while (in->at < in->end && *in->at != ',' && *in->at != ']' && *in->at != '}' && *in->at > ' ') in->at++;
        value->text.size = in->at - value->text.at;
        if (value->kind != 'n' && value->kind != 't' && value->kind != 'f') value->kind = '0';
        if (!value->text.size) fail(TEXT("the input is no JSON")), in->at = in->end;
    }
    return value;
}

static Value *get(Value *object, Text name) {
    for (Value *one = object->first; one; one = one->next)
        if (equal(one->name, name)) return one;
    return NULL;
}

static Text get_text(Value *object, Text name, Text otherwise) {
    Value *found = get(object, name);
    return found ? found->text : otherwise;
}

static uint64_t number(Value *value) {
    uint64_t total = 0;
    for (uint32_t i = 0; i < value->text.size && value->text.at[i] >= '0' && value->text.at[i] <= '9'; i++)
        total = total * 10 + (value->text.at[i] - '0');
    return total;
}

static uint32_t timeout_of(Value *step) {
    Value *found = get(step, TEXT("timeout_ms"));
    return found ? number(found) : 300000;  // what a busy machine may take to let go of what it holds
}

static bool idempotent(Value *step) {
    Value *found = get(step, TEXT("idempotent"));
    return found && found->kind == 't';
}

// JSON out, in one text that grows.

static struct {
    char *at;
    uint32_t size, room;
} out;

static void put(char one) {
    if (out.size == out.room) {
        char *more = allot(out.room = out.room ? 2 * out.room : 4096);
        for (uint32_t i = 0; i < out.size; i++) more[i] = out.at[i];
        out.at = more;
    }
    out.at[out.size++] = one;
}

static void put_text(Text text) {
    for (uint32_t i = 0; i < text.size; i++) put(text.at[i]);
}

static void put_escape(uint32_t code) {
    put_text(TEXT("\\u"));
    for (int shift = 12; shift >= 0; shift -= 4) put("0123456789abcdef"[code >> shift & 15]);
}

static void put_string(Text text) {
    put('"');
    for (uint32_t i = 0; i < text.size;) {
        uint8_t lead = text.at[i++];
        if (lead == '"' || lead == '\\') {
            put('\\');
            put(lead);
        } else if (lead == '\n') {
            put_text(TEXT("\\n"));
        } else if (lead >= ' ' && lead < 0x7f) {
            put(lead);
        } else {
            uint32_t more = lead < 0xc0 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
            uint32_t code = more ? lead & (0x3f >> more) : lead;
            while (more-- && i < text.size) code = code << 6 | (text.at[i++] & 63);
            if (code >= 0x10000) {
                put_escape(0xd800 + ((code - 0x10000) >> 10));
                code = 0xdc00 + ((code - 0x10000) & 0x3ff);
            }
            put_escape(code);
        }
    }
    put('"');
}

static void put_number(int64_t value, bool is_signed) {
    char digits[20];
    int count = 0;
    bool below = is_signed && value < 0;
    uint64_t rest = below ? -(uint64_t)value : (uint64_t)value;
    do digits[count++] = '0' + rest % 10;
    while (rest /= 10);
    if (below) put('-');
    while (count) put(digits[--count]);
}

static void put_value(Value *value) {
    if (value->kind == '"') {
        put_string(value->text);
    } else if (value->kind == '[' || value->kind == '{') {
        put(value->kind);
        for (Value *one = value->first; one; one = one->next) {
            if (one != value->first) put_text(TEXT(", "));
            if (value->kind == '{') put_string(one->name), put_text(TEXT(": "));
            put_value(one);
        }
        put(value->kind == '[' ? ']' : '}');
    } else {
        put_text(value->text);
    }
}

// The steps.

static const Text ERRORS[] = {TEXT("interrupted"), TEXT("timed-out"), TEXT("denied"), TEXT("lost"), TEXT("failed")};

static void put_error(Answer *answer) {
    put_text(TEXT("{\"error\": "));
    put_string(ERRORS[answer->error.kind]);
    put_text(TEXT(", \"text\": "));
    put_string(answer->error.kind >= 2 ? answer->error.text : TEXT(""));
    put('}');
}

typedef struct {
    Header *at;
    uint32_t count;
} Headers;

// The members of an object: first those of `name`, then those of `backwards`, whose values stand backwards
// in the input, which so does not hold them.
static Headers pairs(Value *step, Text name, Text backwards) {
    Value *given = get(step, name), *secret = get(step, backwards);
    Headers found = {allot(((given ? given->count : 0) + (secret ? secret->count : 0)) * sizeof(Header)), 0};
    for (Value *one = given ? given->first : NULL; one; one = one->next)
        found.at[found.count++] = (Header){one->name, one->text};
    for (Value *one = secret ? secret->first : NULL; one; one = one->next) {
        char *text = allot(one->text.size);
        for (uint32_t i = 0; i < one->text.size; i++) text[i] = one->text.at[one->text.size - 1 - i];
        found.at[found.count++] = (Header){one->name, {text, one->text.size}};
    }
    return found;
}

static void do_http(Value *step) {
    Text method = get_text(step, TEXT("method"), TEXT("GET")), url = get_text(step, TEXT("url"), TEXT(""));
    Text body = get_text(step, TEXT("body"), TEXT(""));
    Headers headers = pairs(step, TEXT("headers"), TEXT("secrets"));
    Answer answer;
    host_http(method.at, method.size, url.at, url.size, headers.at, headers.count, body.at, body.size,
              timeout_of(step), idempotent(step), &answer);
    if (answer.failed) return put_error(&answer);
    put_text(TEXT("{\"status\": "));
    put_number(answer.response.status, false);
    put_text(TEXT(", \"headers\": ["));
    for (uint32_t i = 0; i < answer.response.header_count; i++) {
        put_text(i ? TEXT(", [") : TEXT("["));
        put_string(answer.response.headers[i].name);
        put_text(TEXT(", "));
        put_string(answer.response.headers[i].value);
        put(']');
    }
    put_text(TEXT("], \"body\": "));
    put_string(answer.response.body);
    put_text(TEXT(", \"base64\": "));
    put_text(answer.response.base64 ? TEXT("true}") : TEXT("false}"));
}

static void do_exec(Value *step) {
    Value *argv = get(step, TEXT("argv"));
    Text *words = allot((argv ? argv->count : 0) * sizeof(Text)), in = get_text(step, TEXT("stdin"), TEXT(""));
    uint32_t count = 0;
    for (Value *one = argv ? argv->first : NULL; one; one = one->next) words[count++] = one->text;
    Headers env = pairs(step, TEXT("env"), TEXT(""));
    Answer answer;
    host_exec(words, count, env.at, env.count, in.at, in.size, timeout_of(step), idempotent(step), &answer);
    if (answer.failed) return put_error(&answer);
    put_text(TEXT("{\"code\": "));
    put_number(answer.exit.code, true);
    put_text(TEXT(", \"stdout\": "));
    put_string(answer.exit.out);
    put_text(TEXT(", \"stderr\": "));
    put_string(answer.exit.err);
    put('}');
}

// A text, or [level, text].
static void do_log(Value *text) {
    static const Text LEVELS[] = {TEXT("debug"), TEXT("info"), TEXT("warning"), TEXT("error")};
    uint32_t level = 1;
    if (text->kind == '[') {
        for (level = 0; level < 3 && !equal(LEVELS[level], text->first->text); level++) continue;
        text = text->first->next;
    }
    host_log(level, text->text.at, text->text.size);
}

static void do_respond(Value *value) {
    uint32_t before = out.size;
    put_value(value);
    host_respond(out.at + before, out.size - before);
    out.size = before;
}

static void do_progress(Value *step) {
    Value *total = step->first->next;
    host_progress(number(step->first), number(total), total->next->text.at, total->next->text.size);
}

static void loop(void) {
    for (volatile unsigned turns = 0;; turns++) continue;
}

// Real pages, until there are no more.
static void grow(void) {
    for (;;) {
        volatile char *page = allot(1 << 20);
        for (uint32_t i = 0; i < 1 << 20; i += 4096) page[i] = 1;
    }
}

// Down the stack of the machine, for as long as there is one.
static volatile int depth;

static int recurse(void) {
    if (++depth < 0) return 0;
    return recurse() + depth;
}

static void perform(Value *step) {
    Value *what = step->first;
    Text name = what ? what->name : TEXT("");
    if (equal(name, TEXT("http"))) return do_http(what);
    if (equal(name, TEXT("exec"))) return do_exec(what);
    if (equal(name, TEXT("now"))) return put_number(host_now(), false);
    if (equal(name, TEXT("random"))) return put_number(host_random(), false);
    if (equal(name, TEXT("sleep"))) host_sleep(number(what));
    else if (equal(name, TEXT("log"))) do_log(what);
    else if (equal(name, TEXT("respond"))) do_respond(what);
    else if (equal(name, TEXT("progress"))) do_progress(what);
    else if (equal(name, TEXT("loop"))) loop();
    else if (equal(name, TEXT("grow"))) grow();
    else if (equal(name, TEXT("recurse"))) recurse();
    else if (equal(name, TEXT("trap"))) __builtin_trap();
    else if (equal(name, TEXT("fail"))) fail(what->text);
    else if (equal(name, TEXT("raise"))) fail(TEXT("In a step:\n  raise\nRuntimeError: raised by a step\n"));
    else fail(TEXT("there is no such step"));
    put_text(TEXT("null"));
}

__attribute__((export_name("run"))) Ended *run(const char *at, uint32_t size) {
    Value *steps = get(read_value(&(Input){at, at + size}), TEXT("steps"));
    if (!steps) fail(TEXT("the input has no steps"));
    put('[');
    for (Value *step = steps ? steps->first : NULL; step && !ended.failed; step = step->next) {
        if (step != steps->first) put_text(TEXT(", "));
        perform(step);
    }
    put(']');
    if (!ended.failed) ended.text = (Text){out.at, out.size};
    return &ended;
}
