// Everything: #include <lowbitcore/lowbitcore.h>, link lowbitcore::lowbitcore.
#pragma once

#include <lowbitcore/attention.h>
#include <lowbitcore/columns.h>
#include <lowbitcore/decode.h>
#include <lowbitcore/dense.h>
#include <lowbitcore/elementwise.h>
#include <lowbitcore/format.h>
#include <lowbitcore/gptq.h>
#include <lowbitcore/losses.h>
#include <lowbitcore/low_rank.h>
#include <lowbitcore/pack.h>
#include <lowbitcore/qgemm.h>
#include <lowbitcore/quantize.h>
#include <lowbitcore/runtime.h>
#include <lowbitcore/types.h>
