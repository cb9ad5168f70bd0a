/* Preloaded before the C library: the n-th allocation from now on fails, once. See injected.py. */

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

static atomic_long left; /* allocations until the one that fails; 0: none does */
static atomic_long count;

void failing_malloc_arm(long number)
{
    atomic_store(&count, 0);
    atomic_store(&left, number);
}

long failing_malloc_count(void)
{
    return atomic_load(&count);
}

static int fails(void)
{
    atomic_fetch_add(&count, 1);
    if (atomic_load(&left) == 0 || atomic_fetch_sub(&left, 1) != 1)
        return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size)
{
    return fails() ? NULL : __libc_malloc(size);
}

void *calloc(size_t number, size_t size)
{
    return fails() ? NULL : __libc_calloc(number, size);
}

void *realloc(void *old, size_t size)
{
    return fails() ? NULL : __libc_realloc(old, size);
}

void *memalign(size_t alignment, size_t size)
{
    return fails() ? NULL : __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    return memalign(alignment, size);
}

int posix_memalign(void **place, size_t alignment, size_t size)
{
    void *made = memalign(alignment, size);
    if (made == NULL)
        return ENOMEM;
    *place = made;
    return 0;
}
