# What the length of the path does to reading a remote region through a mapping, and to writing it back: from results.csv (`table`) one picture (`picture`, an SVG).
set terminal svg size 900,500 dynamic background "white" font "sans-serif,15"
set output picture
set datafile separator ","
array ways[4] = ["memsync", "TCP", "nbdkit + nbdfuse", "mirror"]
array names[4] = ["memsync, first read through a mapping", "plain TCP", "nbdkit + nbdfuse, first read through a mapping", "memsync, write-back"]
array colour[4] = ["#0072b2", "#999999", "#e69f00", "#009e73"]
of(way) = sprintf("< awk -F, '$1 ~ /^\"?(first read|write-back)/ && $0 ~ /,%s,[0-9]+ ms,/ { print $(NF - 2) + 0 \",\" $(NF - 1) }' '%s' | sort -g", way, table)
set grid lc rgb "#dddddd"
set border 3
set tics nomirror
set key outside bottom center horizontal maxrows 2
set logscale y
set xlabel "round trip (ms)"
set ylabel "GB/s"
set title "One GiB, by round trip"
plot for [i=1:4] of(ways[i] eq "nbdkit + nbdfuse" ? "nbdkit [+] nbdfuse" : ways[i]) using 1:2 with linespoints lw 2 pt 7 ps 0.5 lc rgb colour[i] title names[i]
