/* Step 1 of the kernel (see kernel.py), compiled: weighted means of blocks in float64.
 *
 * It settles every column that it can prove and flags the others, which kernel.py's further steps
 * take. So the bytes are the same with this module and without it; only the time differs.
 *
 * A column is proven in one of two ways. With s the float64 sum of w_k x_k and q = s / total:
 *
 * - Whole-number weights whose products and partial sums float64 holds exactly: all terms are
 *   multiples of the last bit of the smallest |x_k|, and their magnitudes sum to less than 2**52 of
 *   it. `window` is the bound on max|x| / min|x| that says so, upside down.
 * - Otherwise |q - exact| <= error * max|x|, and both ends of that interval round to one output.
 *   What products lose to underflow is nothing beside that: a number is 0 or at least 2**-149.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifdef _WIN32
#error "no positional reads here; without this module the kernel takes its steps in NumPy"
#endif

#include <errno.h>
#include <fenv.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if FLT_EVAL_METHOD != 0 || defined(__FAST_MATH__)
#error "float64 arithmetic has to be exactly that"
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

enum { TILE = 1024 }; /* columns at once: what a tile keeps stays in the nearest caches */

enum format { FLOAT32, BFLOAT16, FLOAT16 };

static const Py_ssize_t ITEMSIZE[] = {4, 2, 2};
static const double SMALLEST_NORMAL = 0x1p-126; /* of all three, with its factor */

#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t bits_of(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* What a stored number is in float64. A float16's bits, put in a float32's places, are the number
 * over 2**112, subnormal numbers included; sums keep that factor to their end. */
#define WIDEN_FLOAT32(bits) ((double)float_of(bits))
#define WIDEN_BFLOAT16(bits) ((double)float_of((uint32_t)(bits) << 16))
#define WIDEN_FLOAT16(bits) \
    ((double)float_of((uint32_t)((bits) & 0x8000u) << 16 | (uint32_t)((bits) & 0x7FFFu) << 13))

static const double FACTOR[] = {1.0, 1.0, 0x1p-112};

/* Functions for one source format. They take four rows at once, `stride` numbers apart: what is kept
 * a column then passes through memory once for all four.
 *
 * note_*: the largest magnitude of each column, and the smallest less one, which makes 0 the largest
 * of all: it ends no window. Magnitudes are ordered as their bits are.
 * add_*: the weighted sums.
 * widen_*: a row in float64, for several outputs.
 * span_*: largest and smallest as numbers (times the format's factor); whether all are finite. */
#define SOURCE(name, type, magnitude_bits, infinity, WIDEN)                                       \
    VECTORISED static void note4_##name(const type *restrict row, Py_ssize_t stride,              \
                                        type *restrict largest, type *restrict smallest, int n)   \
    {                                                                                             \
        const type *restrict r1 = row + stride, *restrict r2 = r1 + stride,                       \
                   *restrict r3 = r2 + stride;                                                    \
        for (int j = 0; j < n; j++) {                                                             \
            type a = row[j] & magnitude_bits, b = r1[j] & magnitude_bits;                         \
            type c = r2[j] & magnitude_bits, d = r3[j] & magnitude_bits;                          \
            type high = LARGER(LARGER(a, b), LARGER(c, d));                                       \
            type low = SMALLER(SMALLER((type)(a - 1), (type)(b - 1)),                             \
                               SMALLER((type)(c - 1), (type)(d - 1)));                            \
            largest[j] = LARGER(high, largest[j]);                                                \
            smallest[j] = SMALLER(low, smallest[j]);                                              \
        }                                                                                         \
    }                                                                                             \
    VECTORISED static void note1_##name(const type *restrict row, type *restrict largest,         \
                                        type *restrict smallest, int n)                           \
    {                                                                                             \
        for (int j = 0; j < n; j++) {                                                             \
            type a = row[j] & magnitude_bits, below = (type)(a - 1);                              \
            largest[j] = LARGER(a, largest[j]);                                                   \
            smallest[j] = SMALLER(below, smallest[j]);                                            \
        }                                                                                         \
    }                                                                                             \
    VECTORISED static void add4_##name(double *restrict sum, const double *weights,               \
                                       const type *restrict row, Py_ssize_t stride, int n)        \
    {                                                                                             \
        const type *restrict r1 = row + stride, *restrict r2 = r1 + stride,                       \
                   *restrict r3 = r2 + stride;                                                    \
        const double w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];          \
        for (int j = 0; j < n; j++)                                                               \
            sum[j] = sum[j] + w0 * WIDEN(row[j]) + w1 * WIDEN(r1[j]) + w2 * WIDEN(r2[j]) +        \
                     w3 * WIDEN(r3[j]);                                                           \
    }                                                                                             \
    VECTORISED static void add1_##name(double *restrict sum, double weight,                       \
                                       const type *restrict row, int n)                           \
    {                                                                                             \
        for (int j = 0; j < n; j++)                                                               \
            sum[j] += weight * WIDEN(row[j]);                                                     \
    }                                                                                             \
    VECTORISED static void widen_##name(const type *restrict row, double *restrict x, int n)      \
    {                                                                                             \
        for (int j = 0; j < n; j++)                                                               \
            x[j] = WIDEN(row[j]);                                                                 \
    }                                                                                             \
    VECTORISED static int span_##name(const type *restrict largest, const type *restrict smallest,\
                                      double *restrict high, double *restrict low, int n)         \
    {                                                                                             \
        type most = 0;                                                                            \
        for (int j = 0; j < n; j++) {                                                             \
            type least = SMALLER(smallest[j], (type)(infinity - 1)) + 1;                          \
            most = LARGER(most, largest[j]);                                                      \
            high[j] = WIDEN(largest[j]);                                                          \
            low[j] = WIDEN(least);                                                                \
        }                                                                                         \
        return most < infinity;                                                                   \
    }

SOURCE(float32, uint32_t, 0x7FFFFFFFu, 0x7F800000u, WIDEN_FLOAT32)
SOURCE(bfloat16, uint16_t, 0x7FFFu, 0x7F80u, WIDEN_BFLOAT16)
SOURCE(float16, uint16_t, 0x7FFFu, 0x7C00u, WIDEN_FLOAT16)

VECTORISED static void add4(double *restrict sum, const double *weights,
                            const double (*restrict x)[TILE], int n)
{
    const double w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
    for (int j = 0; j < n; j++)
        sum[j] = sum[j] + w0 * x[0][j] + w1 * x[1][j] + w2 * x[2][j] + w3 * x[3][j];
}

VECTORISED static void add1(double *restrict sum, double weight, const double *restrict x, int n)
{
    for (int j = 0; j < n; j++)
        sum[j] += weight * x[j];
}

/* Turn sums into the two ends of an interval round the exact mean; one number where it is known.
 * Return whether it is known in every column. */
VECTORISED static int divide(double *restrict low, double *restrict high,
                             const double *restrict largest, const double *restrict smallest,
                             double total, double window, double error, int n)
{
    int known = 1;
    for (int j = 0; j < n; j++) {
        double quotient = low[j] / total;
        double least = LARGER(smallest[j], SMALLEST_NORMAL);
        double reach = error * largest[j];
        int exact = (largest[j] == 0.0) | (largest[j] * window <= least);
        low[j] = exact ? quotient : quotient - reach;
        high[j] = exact ? quotient : quotient + reach;
        known &= exact;
    }
    return known;
}

/* round_*: round once, to nearest even. bracket_*: round both ends of intervals; write the lower, flag
 * where they differ, count flags. */
#define TARGET(name, type, ROUND)                                                                 \
    VECTORISED static void round_##name(const double *restrict mean, type *restrict out, int n)   \
    {                                                                                             \
        for (int j = 0; j < n; j++)                                                               \
            out[j] = (type)ROUND(mean[j]);                                                        \
    }                                                                                             \
    VECTORISED static int bracket_##name(const double *restrict low, const double *restrict high, \
                                         type *restrict out, uint8_t *restrict flags, int n)      \
    {                                                                                             \
        int count = 0;                                                                            \
        for (int j = 0; j < n; j++) {                                                             \
            type a = (type)ROUND(low[j]), b = (type)ROUND(high[j]);                               \
            out[j] = a;                                                                           \
            flags[j] = a != b;                                                                    \
            count += a != b;                                                                      \
        }                                                                                         \
        return count;                                                                             \
    }

static inline uint32_t float32_of(double value)
{
    float rounded = (float)value;
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    return bits;
}

/* A binary16-like format: `mantissa` stored bits, exponent field of `bias`, in 16 bits. */
static inline __attribute__((always_inline)) uint64_t narrow(double value, int mantissa, int bias)
{
    const int shift = 52 - mantissa;
    const uint64_t infinite = (uint64_t)(2 * bias + 1) << mantissa;
    uint64_t bits = bits_of(value), magnitude = bits & ~(1ull << 63);
    /* A carry out of the mantissa raises the exponent, as it should. */
    uint64_t normal = (magnitude + (1ull << (shift - 1)) - 1 + (magnitude >> shift & 1)) >> shift;
    normal -= (uint64_t)(1023 - bias) << mantissa;
    normal = normal < infinite ? normal : infinite;
    /* Smaller numbers are whole multiples of the smallest: adding 2**52 rounds to those. */
    const double smallest_normal = ldexp(1.0, 1 - bias);
    double units = fabs(value) * ldexp(1.0, bias - 1 + mantissa) + 0x1p52;
    uint64_t subnormal = bits_of(units) & 0xFFFF;
    return (fabs(value) < smallest_normal ? subnormal : normal) | bits >> 63 << 15;
}

#define BFLOAT16_OF(value) narrow(value, 7, 127)
#define FLOAT16_OF(value) narrow(value, 10, 15)

TARGET(float32, uint32_t, float32_of)
TARGET(bfloat16, uint16_t, BFLOAT16_OF)
TARGET(float16, uint16_t, FLOAT16_OF)

struct job {
    char *block;          /* inputs x portion, of `source` */
    char *outs;           /* outputs x columns, of `target` */
    uint8_t *flags;       /* outputs x portion */
    int64_t *counts;      /* outputs: flags that are set */
    const double *matrix; /* outputs x inputs */
    const double *rows;   /* outputs x (total, window, error) */
    Py_ssize_t inputs, outputs, columns;
    enum format source, target;
};

#define CALL(format, function, ...)                                                               \
    ((format) == FLOAT32    ? function##_float32(__VA_ARGS__)                                     \
     : (format) == BFLOAT16 ? function##_bfloat16(__VA_ARGS__)                                    \
                            : function##_float16(__VA_ARGS__))

/* In what follows a tile is n columns of a portion's rows, which are `stride` numbers apart. */

/* The extreme magnitudes of each column of a tile; 0 if one of them is not finite. */
static int extremes(const struct job *job, const char *tile, Py_ssize_t stride, double *high,
                    double *low, int n)
{
    union {
        uint32_t wide[TILE];
        uint16_t narrow[TILE];
    } largest, smallest; /* magnitudes in the source's bits */
    memset(&largest, 0, sizeof largest);
    memset(&smallest, 0xFF, sizeof smallest);
    Py_ssize_t row = stride * ITEMSIZE[job->source], input = 0;
    for (; input + 4 <= job->inputs; input += 4)
        CALL(job->source, note4, (const void *)(tile + input * row), stride, (void *)&largest,
             (void *)&smallest, n);
    for (; input < job->inputs; input++)
        CALL(job->source, note1, (const void *)(tile + input * row), (void *)&largest,
             (void *)&smallest, n);
    return CALL(job->source, span, (const void *)&largest, (const void *)&smallest, high, low, n);
}

/* The weighted sums of one tile for one output. */
static void weigh(const struct job *job, const char *tile, Py_ssize_t stride, double *sum, int n)
{
    Py_ssize_t row = stride * ITEMSIZE[job->source], input = 0;
    for (int j = 0; j < n; j++)
        sum[j] = -0.0; /* what leaves every term's sign as it is */
    while (input < job->inputs) {
        const double *w = job->matrix + input;
        const void *numbers = tile + input * row;
        if (input + 4 <= job->inputs && w[0] != 0.0 && w[1] != 0.0 && w[2] != 0.0 && w[3] != 0.0) {
            CALL(job->source, add4, sum, w, numbers, stride, n);
            input += 4;
        } else {
            if (*w != 0.0) /* else it is no term: 0 times -1 would be -0 */
                CALL(job->source, add1, sum, *w, numbers, n);
            input += 1;
        }
    }
}

/* The weighted sums of one tile for all outputs, each TILE long; every input is widened once. */
static void weigh_all(const struct job *job, const char *tile, Py_ssize_t stride, double *sums,
                      int n)
{
    double x[4][TILE];
    Py_ssize_t row = stride * ITEMSIZE[job->source];
    for (Py_ssize_t place = 0; place < job->outputs * TILE; place++)
        sums[place] = -0.0;
    for (Py_ssize_t input = 0; input < job->inputs; input += 4) {
        int taken = (int)SMALLER(job->inputs - input, (Py_ssize_t)4);
        for (int i = 0; i < taken; i++)
            CALL(job->source, widen, (const void *)(tile + (input + i) * row), x[i], n);
        for (Py_ssize_t output = 0; output < job->outputs; output++) {
            const double *w = job->matrix + output * job->inputs + input;
            double *sum = sums + output * TILE;
            if (taken == 4 && w[0] != 0.0 && w[1] != 0.0 && w[2] != 0.0 && w[3] != 0.0)
                add4(sum, w, (const double (*)[TILE])x, n);
            else
                for (int i = 0; i < taken; i++)
                    if (w[i] != 0.0)
                        add1(sum, w[i], x[i], n);
        }
    }
}

/* Settle a portion: `width` columns, whose results begin at column `first` of the outputs.
 * Return 1, or 0 if a number is not finite: then nothing written counts. */
static int settle_portion(const struct job *job, double *sums, Py_ssize_t first, Py_ssize_t width)
{
    double largest[TILE], smallest[TILE], high[TILE];
    const double factor = FACTOR[job->source];
    for (Py_ssize_t begin = 0; begin < width; begin += TILE) {
        int n = (int)SMALLER(width - begin, (Py_ssize_t)TILE);
        const char *tile = job->block + begin * ITEMSIZE[job->source];
        if (!extremes(job, tile, width, largest, smallest, n))
            return 0;
        if (job->outputs == 1)
            weigh(job, tile, width, sums, n);
        else
            weigh_all(job, tile, width, sums, n);
        for (Py_ssize_t output = 0; output < job->outputs; output++) {
            const double *row = job->rows + 3 * output;
            double *low = sums + output * TILE;
            uint8_t *flags = job->flags + output * width + begin;
            void *out = job->outs +
                        (output * job->columns + first + begin) * ITEMSIZE[job->target];
            if (divide(low, high, largest, smallest, row[0] * factor, row[1], row[2] / factor, n)) {
                CALL(job->target, round, low, out, n);
                memset(flags, 0, (size_t)n);
            } else
                job->counts[output] += CALL(job->target, bracket, low, high, out, flags, n);
        }
    }
    return 1;
}

enum outcome { SETTLED, LEFT_OVER, NOT_FINITE, READ_FAILED, FILE_ENDED };

/* Read a portion's rows, one behind the other; `input` tells of a failure which one it was. */
static enum outcome fill(const struct job *job, const int *descriptors, const int64_t *offsets,
                         Py_ssize_t first, Py_ssize_t width, Py_ssize_t *input)
{
    const size_t size = (size_t)(width * ITEMSIZE[job->source]);
    for (*input = 0; *input < job->inputs; ++*input) {
        char *row = job->block + (size_t)*input * size;
        off_t offset = (off_t)(offsets[*input] + first * ITEMSIZE[job->source]);
        for (size_t done = 0; done < size;) {
            ssize_t count = pread(descriptors[*input], row + done, size - done,
                                  offset + (off_t)done);
            if (count > 0)
                done += (size_t)count;
            else if (count == 0)
                return FILE_ENDED;
            else if (errno != EINTR)
                return READ_FAILED;
        }
    }
    return SETTLED;
}

PyDoc_STRVAR(settle_doc,
"settle(block, outs, flags, counts, matrix, rows, source, target, start, descriptors, offsets)\n\n"
"Write means of columns from `start` on, up to the first portion in which some remain.\n\n"
"All are contiguous buffers of bytes: outs (R, B) of `target`, flags (R, P) bytes, counts (R,)\n"
"int64, matrix (R, K) float64, rows (R, 3) float64: total, window and error. A window is infinite\n"
"for weights that are not small whole numbers. Formats: 0 float32, 1 bfloat16, 2 float16.\n"
"Without descriptors the block (K, P) of `source` holds the numbers, and P is B. With them, int32\n"
"(K,), and the offsets of the columns in the files, int64 (K,), portions of up to P columns are\n"
"read into it.\n\n"
"Return (first, stop, finite): the block holds a portion, the columns from first to stop, packed,\n"
"as do the flags; all columns before are done. Not finite: then the portion's outs hold nothing.\n"
"Both are B when all is done. Raise EOFError with the input whose file ends before its numbers,\n"
"OSError with errno, text and the input where one cannot be read.");

static PyObject *settle(PyObject *self, PyObject *args)
{
    enum { BLOCK, OUTS, FLAGS, COUNTS, MATRIX, ROWS, DESCRIPTORS, OFFSETS, BUFFERS };
    Py_buffer buffers[BUFFERS];
    Py_ssize_t first, stop;
    int source, target;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*w*w*y*y*iiny*y*:settle", &buffers[BLOCK], &buffers[OUTS],
                          &buffers[FLAGS], &buffers[COUNTS], &buffers[MATRIX], &buffers[ROWS],
                          &source, &target, &first, &buffers[DESCRIPTORS], &buffers[OFFSETS]))
        return NULL;
    PyObject *result = NULL;
    double *sums = NULL;
    struct job job = {buffers[BLOCK].buf, buffers[OUTS].buf, buffers[FLAGS].buf,
                      buffers[COUNTS].buf, buffers[MATRIX].buf, buffers[ROWS].buf,
                      0, 0, 0, (enum format)source, (enum format)target};
    job.outputs = buffers[COUNTS].len / 8;
    if (source < 0 || source > 2 || target < 0 || target > 2 || job.outputs == 0) {
        PyErr_SetString(PyExc_ValueError, "formats are 0, 1 and 2; there is at least one output");
        goto done;
    }
    job.inputs = buffers[MATRIX].len / 8 / job.outputs;
    job.columns = buffers[OUTS].len / job.outputs / ITEMSIZE[target];
    const Py_ssize_t portion = buffers[FLAGS].len / job.outputs;
    const int reads = buffers[DESCRIPTORS].len > 0;
    if (buffers[MATRIX].len != job.outputs * job.inputs * 8 ||
        buffers[ROWS].len != job.outputs * 24 ||
        buffers[FLAGS].len != job.outputs * portion ||
        buffers[BLOCK].len != job.inputs * portion * ITEMSIZE[source] ||
        (reads && buffers[BLOCK].readonly) ||
        buffers[OUTS].len != job.outputs * job.columns * ITEMSIZE[target] ||
        buffers[DESCRIPTORS].len != (reads ? job.inputs * (Py_ssize_t)sizeof(int) : 0) ||
        buffers[OFFSETS].len != (reads ? job.inputs * 8 : 0) || first < 0 ||
        (reads ? portion == 0 : portion != job.columns || first != 0)) {
        PyErr_SetString(PyExc_ValueError, "the buffers' sizes do not fit together");
        goto done;
    }
    sums = malloc((size_t)job.outputs * TILE * sizeof *sums);
    if (sums == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    enum outcome outcome = SETTLED;
    Py_ssize_t input = 0;
    int failure = 0;
    fenv_t environment;
    Py_BEGIN_ALLOW_THREADS
    /* Some libraries have the processor take subnormal numbers for zero. */
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    memset(job.counts, 0, (size_t)job.outputs * sizeof *job.counts);
    for (stop = first; first < job.columns; first = stop) {
        stop = SMALLER(first + portion, job.columns);
        if (reads)
            outcome = fill(&job, buffers[DESCRIPTORS].buf, buffers[OFFSETS].buf, first,
                           stop - first, &input);
        failure = errno;
        if (outcome == SETTLED && !settle_portion(&job, sums, first, stop - first))
            outcome = NOT_FINITE;
        for (Py_ssize_t output = 0; outcome == SETTLED && output < job.outputs; output++)
            if (job.counts[output])
                outcome = LEFT_OVER;
        if (outcome != SETTLED)
            break;
    }
    fesetenv(&environment);
    Py_END_ALLOW_THREADS
    if (outcome == READ_FAILED) {
        PyObject *details = Py_BuildValue("isn", failure, strerror(failure), input);
        if (details != NULL)
            PyErr_SetObject(PyExc_OSError, details);
        Py_XDECREF(details);
    } else if (outcome == FILE_ENDED) {
        PyObject *number = PyLong_FromSsize_t(input);
        PyErr_SetObject(PyExc_EOFError, number);
        Py_XDECREF(number);
    } else
        result = Py_BuildValue("nni", first, stop, outcome != NOT_FINITE);
done:
    free(sums);
    for (int i = 0; i < BUFFERS; i++)
        PyBuffer_Release(&buffers[i]);
    return result;
}

static PyMethodDef METHODS[] = {
    {"settle", settle, METH_VARARGS, settle_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "wavg._compiled",
    "The kernel's first step in C; optional. See wavg.kernel.", -1, METHODS,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__compiled(void)
{
    return PyModule_Create(&MODULE);
}
